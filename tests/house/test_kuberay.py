"""The manifests of cluster/kuberay hold together, and every overlay has room for its run. Nothing was
run on Kubernetes.
"""

import copy
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from eopd.config import load_config
from eopd.runtime.placement import Capacity, Node, plan, require_capacity

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
KUBERAY = CLUSTER / "kuberay"
OVERLAYS = sorted(path.parent for path in KUBERAY.glob("overlays/*/kustomization.yaml"))
FOLDERS = [*OVERLAYS, KUBERAY / "monitoring"]
UNITS = {"Gi": 2**30, "Mi": 2**20}


def read(path):
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def named(path):
    return str(path.relative_to(KUBERAY))


# --- what kustomize makes of a folder, as far as these folders need it


def build(folder):
    """Objects of a folder: its resources, then its generators, labels, patches and images."""
    (made,) = read(folder / "kustomization.yaml")
    found = []
    for name in made["resources"]:
        path = folder / name
        found += build(path) if path.is_dir() else read(path)

    options = made.get("generatorOptions", {})
    for config_map in made.get("configMapGenerator", []):
        texts = [(folder / file).read_text(encoding="utf-8") for file in config_map["files"]]
        names = [Path(file).name for file in config_map["files"]]
        metadata = {"name": config_map["name"], "labels": dict(options["labels"])}
        data = dict(zip(names, texts, strict=True))
        found.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data})

    for entry in made.get("labels", []):
        for one in found:
            one["metadata"].setdefault("labels", {}).update(entry["pairs"])

    for entry in made.get("patches", []):
        assert entry["target"] == {"kind": "RayJob"}
        for one in found:
            for step in yaml.safe_load(entry["patch"]):
                change(one, **{key.replace("from", "origin"): part for key, part in step.items()})

    for image in made.get("images", []):
        for container in every_container(found):
            if container["image"] == image["name"]:
                container["image"] = f"{image['newName']}:{image['newTag']}"

    return found


def change(document, op, path, value=None, origin=None):
    """One operation of a JSON patch (RFC 6902), on a document with its parts in lists and maps."""
    if op == "move":
        value = change(document, "remove", origin)
        op = "add"

    *steps, last = path.strip("/").split("/")
    place = document
    for step in steps:
        place = place[int(step) if isinstance(place, list) else step]

    key = int(last) if isinstance(place, list) else last
    if op == "remove":
        return place.pop(key)

    assert op == "add" or place[key] is not None, f"{path}: nothing there to replace"
    place[key] = copy.deepcopy(value)
    return None


def every_container(part):
    if isinstance(part, list):
        for one in part:
            yield from every_container(one)
    elif isinstance(part, dict):
        for key, one in part.items():
            if key in ("containers", "initContainers"):
                yield from one
            else:
                yield from every_container(one)


def kustomize():
    if shutil.which("kustomize"):
        return ["kustomize", "build"]

    return ["kubectl", "kustomize"] if shutil.which("kubectl") else None


@pytest.mark.skipif(kustomize() is None, reason="neither kustomize nor kubectl is on PATH")
@pytest.mark.parametrize("folder", FOLDERS, ids=named)
def test_kustomize_makes_the_same_of_every_folder(folder):
    command = [*kustomize(), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    assert in_order(yaml.safe_load_all(done.stdout)) == in_order(build(folder))


def in_order(objects):
    return sorted(json.dumps(one, sort_keys=True) for one in objects)


def test_every_folder_says_how_it_is_applied():
    for folder in FOLDERS:
        text = (folder / "kustomization.yaml").read_text(encoding="utf-8")
        assert f"#   kubectl apply -k {folder.relative_to(ROOT)}\n" in text
        assert "Not yet run." in text


# --- the pods of an overlay


@pytest.fixture(params=OVERLAYS, ids=named)
def overlay(request):
    (only,) = build(request.param)
    return only


def cluster_of(one):
    return one["spec"] if one["kind"] == "RayCluster" else one["spec"]["rayClusterSpec"]


def groups(one):
    return [cluster_of(one)["headGroupSpec"], *cluster_of(one)["workerGroupSpecs"]]


def pods(one):
    """The specs of the pods of each group, and of the one that submits."""
    submitter = one["spec"].get("submitterPodTemplate")
    templates = [group["template"] for group in groups(one)] + ([submitter] if submitter else [])
    return [template["spec"] for template in templates]


def containers(pod):
    return [*pod.get("initContainers", []), *pod["containers"]]


def number(quantity):
    amount, unit = re.fullmatch(r"(\d+)(\w*)", quantity).groups()
    return int(amount) * UNITS.get(unit, 1)


def test_kind_version_and_token(overlay):
    assert overlay["apiVersion"] == "ray.io/v1"
    assert overlay["kind"] in ("RayJob", "RayCluster")
    cluster = cluster_of(overlay)
    assert cluster["authOptions"] == {"mode": "token"}
    for kind in ("cpu", "gpu"):
        lock = (CLUSTER / f"requirements-{kind}.lock").read_text(encoding="utf-8")
        assert f"\nray=={cluster['rayVersion']}\n" in lock


def test_all_pods_run_one_image_of_this_folder(overlay):
    (image,) = {container["image"] for pod in pods(overlay) for container in containers(pod)}
    name, _, tag = image.partition(":")
    assert name == "eopd"
    assert (CLUSTER / f"Dockerfile.{tag}").is_file()
    wants_gpus = "nvidia.com/gpu" in json.dumps(overlay)
    assert tag == ("gpu" if wants_gpus else "cpu")


def test_requests_are_limits_for_all_three_resources(overlay):
    for pod in pods(overlay):
        for container in containers(pod):
            resources = container["resources"]
            assert resources["requests"] == resources["limits"]
            assert {"cpu", "memory", "ephemeral-storage"} <= resources["limits"].keys()


def test_shared_memory_holds_the_object_store(overlay):
    for group in groups(overlay):
        pod = group["template"]["spec"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        (container,) = pod["containers"]
        memory = number(container["resources"]["limits"]["memory"])
        shared = volumes["shm"]["emptyDir"]
        assert shared["medium"] == "Memory"
        assert 0.3 * memory <= number(shared["sizeLimit"]) <= 0.5 * memory


def test_volumes_that_are_mounted_are_there(overlay):
    (claim,) = read(KUBERAY / "claim.yaml")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in pods(overlay):
        volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
        for container in containers(pod):
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes.keys()

    for group in groups(overlay):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        paths = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert paths == {"shared": "/shared", "shm": "/dev/shm"}
        (shared,) = [volume for volume in pod["volumes"] if volume["name"] == "shared"]
        assert shared["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


def test_nothing_runs_as_root(overlay):
    for pod in pods(overlay):
        user = pod["securityContext"]
        assert user["runAsNonRoot"] is True
        assert user["runAsUser"] == user["runAsGroup"] == user["fsGroup"] == 1000
        assert user["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in containers(pod):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }

    for kind in ("cpu", "gpu"):
        text = (CLUSTER / f"Dockerfile.{kind}").read_text(encoding="utf-8")
        assert text.endswith("USER 1000:1000\n")


def test_gpu_pods_take_a_whole_node_and_tolerate_its_taint(overlay):
    for group in cluster_of(overlay)["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        gpus = pod["containers"][0]["resources"]["limits"].get("nvidia.com/gpu")
        assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]
        if group["groupName"] == "cpu":
            assert gpus is None
            continue

        assert gpus == "8"
        taint = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
        assert pod["tolerations"] == [taint]


def test_the_secret_is_optional_and_in_no_manifest(overlay):
    for group in groups(overlay):
        (container,) = group["template"]["spec"]["containers"]
        variables = {variable["name"]: variable for variable in container["env"]}
        assert "value" not in variables["HF_TOKEN"]
        assert variables["HF_TOKEN"]["valueFrom"]["secretKeyRef"]["optional"] is True
        assert variables["HF_HOME"]["value"].startswith("/shared/")


def test_a_pod_that_is_deleted_lets_the_run_save_its_checkpoint(overlay):
    head, *workers = groups(overlay)
    (container,) = head["template"]["spec"]["containers"]
    variables = {variable["name"]: variable.get("value") for variable in container["env"]}
    stop_s = int(variables["RAY_JOB_STOP_WAIT_TIME_S"])

    for group in (head, *workers):
        pod = group["template"]["spec"]
        assert pod["terminationGracePeriodSeconds"] >= stop_s + 30
        command = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert command[:2] == ["bash", "-c"]
        subprocess.run(["bash", "-n", "-c", command[2]], check=True)
        assert ("stop_job" in command[2]) == (group is head)
        assert waits_for(command[2]) == [*our_actors(), "JobSupervisor"]

    hook = container["lifecycle"]["preStop"]["exec"]["command"][2]
    compile(re.search(r"python -c '\n(.*)'", hook, re.DOTALL).group(1), "preStop", "exec")


def our_actors():
    text = "".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "eopd/runtime").glob("*.py")
    )
    return sorted(re.findall(r"^class (\w+)\(Actor\):", text, re.MULTILINE))


def waits_for(script):
    """Which processes the hook of a pod waits for, of those that have such titles on a node of Ray
    2.60. The agents and IDLE are there as long as the node is.
    """
    pattern = re.search(r'grep -sqaE "([^"]+)" /proc', script).group(1)
    names = [*our_actors(), "JobSupervisor", "IDLE", "DashboardAgent", "RuntimeEnvAgent"]
    return [name for name in names if re.search(pattern, f"ray::{name}")]


# --- the run


def test_the_entrypoint_fits_into_the_pods(overlay):
    if overlay["kind"] == "RayCluster":
        return

    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    program, verb, config, *options = shlex.split(overlay["spec"]["entrypoint"])
    assert program in scripts["project"]["scripts"]
    assert (verb, options[:2]) == ("train", ["--resume", "auto"])
    assert set(options[2::2]) == {"--set"}
    run = load_config(ROOT / config, options[3::2])
    assert run.run.directory == Path("/shared/runs")
    models = [run.student.model, *(teacher.model for teacher in run.teachers)]
    for path in map(str, models):
        assert path.startswith("/shared/models/") or re.fullmatch(r"[\w-]+/[\w.-]+", path)

    nodes = []
    for group in cluster_of(overlay)["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        gpus = float(limits.get("nvidia.com/gpu", 0))
        free = Capacity(cpus=float(limits["cpu"]), gpus=gpus)
        nodes += [Node(total=free, free=free)] * group["replicas"]

    require_capacity(plan(run), nodes)
    asked = sum(role.actors * role.gpus for role in plan(run))
    assert asked == sum(node.total.gpus for node in nodes), "every GPU has work"
    assert cluster_of(overlay)["headGroupSpec"]["rayStartParams"] == {
        "num-cpus": "0",
        "num-gpus": "0",
    }


def test_a_repeat_goes_on_where_the_last_attempt_ended(overlay):
    if overlay["kind"] == "RayJob":
        assert overlay["spec"]["backoffLimit"] > 0
        assert overlay["spec"]["shutdownAfterJobFinishes"] is True
        run = load_config(ROOT / "configs/tiny.yaml", settings_of(overlay))
        for group in groups(overlay):  # the pods of the last attempt may still be there
            pod = group["template"]["spec"]
            assert run.cluster.wait_s >= pod["terminationGracePeriodSeconds"]


def settings_of(overlay):
    """Returns the settings of the entrypoint that every config takes."""
    options = shlex.split(overlay["spec"]["entrypoint"])
    return [text for text in options if text.startswith(("cluster.", "telemetry."))]


def test_no_autoscaler_moves_a_pod_of_a_run(overlay):
    templates = [group["template"] for group in groups(overlay)]
    if overlay["kind"] == "RayJob":
        templates.append(overlay["spec"]["submitterPodTemplate"])
        assert overlay["spec"]["submitterConfig"]["backoffLimit"] >= 100

    for template in templates:
        assert template["metadata"]["annotations"] == {
            "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
            "karpenter.sh/do-not-disrupt": "true",
        }


# --- metrics


def test_prometheus_scrapes_ports_that_pods_have_under_the_names_that_rules_know(overlay):
    monitors = {
        one["metadata"]["name"]: one["spec"]
        for one in build(KUBERAY / "monitoring")
        if one["kind"] == "PodMonitor"
    }
    scraped = {}
    for spec in monitors.values():
        (endpoint,) = spec["podMetricsEndpoints"]
        jobs = [rule for rule in endpoint["relabelings"] if rule["targetLabel"] == "job"]
        scraped[jobs[0]["replacement"]] = (endpoint["port"], spec["selector"]["matchLabels"])

    (prometheus,) = read(ROOT / "dashboards" / "prometheus.yml")
    assert scraped.keys() == {job["job_name"] for job in prometheus["scrape_configs"]}
    for group in groups(overlay):
        is_head = "groupName" not in group
        ours = group["template"]["metadata"]["labels"]
        labels = ours | {"ray.io/node-type": "head" if is_head else "worker"}  # KubeRay's
        ports = {
            port["name"]: port["containerPort"]
            for port in group["template"]["spec"]["containers"][0]["ports"]
        }
        reached = {job for job, (_, wanted) in scraped.items() if wanted.items() <= labels.items()}
        assert reached == ({"eopd", "ray"} if is_head else {"ray"})
        assert {scraped[job][0] for job in reached} <= ports.keys()
        assert ports["metrics"] == 8080
        if is_head:
            # KubeRay's Service has its defaults only where no port is named
            assert {"gcs-server", "dashboard", "client"} <= ports.keys()
            served = shlex.split(overlay["spec"].get("entrypoint", "telemetry.port=9400"))
            assert f"telemetry.port={ports['eopd-metrics']}" in served
