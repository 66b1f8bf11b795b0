"""Debian's Prometheus, with our configuration and rules, scrapes a real run: whatever we ask
of it has an answer.
"""

import json
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import yaml
from program import Run

DASHBOARDS = Path(__file__).parents[2] / "dashboards"
RULES = DASHBOARDS / "rules" / "eopd.yml"
NOT_HERE = ("vllm:", "rate(vllm:", "ray_node_gpus")  # no served teacher, and no GPU
ANSWER_S = 60.0  # a rate needs two scrapes, a recorded rule an evaluation

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("prometheus") is None, reason="Debian's prometheus is not installed"
    ),
]


@pytest.fixture(scope="module")
def run(program):
    """A run that has every metric: asynchronous, rewarded, probed at every sync, evaluated, uploaded,
    with a peak rate.
    """
    data = "configs/prompts/arithmetic.jsonl"
    benchmark = f"{{name: sums, data: {data}, grader: math, samples: 2, prompts: 2}}"
    run = Run(
        program,
        "watched",
        "run.batches=3000",
        "rollout.engines=1",
        "learner.ranks=1",
        f"run.upload=file://{program.runs.parent}/elsewhere",
        "checkpoint.every=4",
        "evaluation.prompts=2",
        "evaluation.every=2",
        f"evaluation.benchmarks=[{benchmark}]",
        "flow={batch_prompts: 4, max_staleness: 1}",
        f"prompts.data={data}",
        "loss.reverse_kl={kind: sampled, reward: {function: math, weight: 0.1}}",
        "rollout.samples_per_prompt=2",
        "weights.verify_every=2",
        "learner.peak_flops=1.0e+12",
        f"telemetry.discovery={program.runs.parent}/targets",
        "rollout.vllm={kv_cache_memory_bytes: 67108864, disable_log_stats: false}",
        "teachers.0.vllm={kv_cache_memory_bytes: 67108864, disable_log_stats: false}",
    )
    run.wait(lambda row: row["step"] >= 3)
    yield run
    run.interrupt()


@pytest.fixture(scope="module")
def query(run, tmp_path_factory):
    """Ask a Prometheus that runs on ``dashboards/prometheus.yml``, with the folder in which the run
    tells of itself, and a faster pace.
    """
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((DASHBOARDS / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(RULES)]
    del config["alerting"]  # an Alertmanager of this machine is not ours
    targets = f"{run.program.runs.parent}/targets/*.json"
    config["scrape_configs"][0]["file_sd_configs"] = [{"files": [targets]}]
    (folder / "ray.json").write_text(json.dumps([{"targets": [f"127.0.0.1:{_ray_port(run)}"]}]))
    config["scrape_configs"][1]["file_sd_configs"] = [{"files": [str(folder / "ray.json")]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    options = {"config.file": folder / "prometheus.yml", "storage.tsdb.path": folder / "data"}
    options["web.listen-address"] = f"127.0.0.1:{port}"

    with (folder / "log").open("w") as log:
        command = ["prometheus", *(f"--{name}={value}" for name, value in options.items())]
        process = subprocess.Popen(command, stdout=log, stderr=log)

        def get(path, **arguments):
            url = f"http://127.0.0.1:{port}/{path}?{urllib.parse.urlencode(arguments)}"
            # an HTTP error is a query that is wrong
            with urllib.request.urlopen(url, timeout=10) as response:
                return response.read()

        try:
            deadline = time.monotonic() + ANSWER_S
            while not _ready(get):
                assert process.poll() is None and time.monotonic() < deadline, (
                    folder / "log"
                ).read_text()
                time.sleep(0.2)

            yield lambda expression: json.loads(get("api/v1/query", query=expression))["data"][
                "result"
            ]
        finally:
            process.terminate()
            process.wait(timeout=30)


def _ray_port(run):
    """Where Ray's agent serves metrics; without a dashboard Ray writes no file for Prometheus."""
    (raylet,) = [process for process in run.program.marked() if process.name() == "raylet"]
    (session,) = set(re.findall(r"/\S+/session_[\d_-]+", " ".join(raylet.cmdline())))
    (port,) = Path(session).glob("metrics_export_port_*")
    return int(port.read_text())


def _ready(get):
    try:
        return get("-/ready")
    except OSError:
        return False


def unanswered(query, expressions):
    """Those that have no data within ``ANSWER_S``, all together."""
    deadline = time.monotonic() + ANSWER_S
    while (left := [one for one in expressions if not query(one)]) and time.monotonic() < deadline:
        time.sleep(1.0)

    return left


@pytest.mark.parametrize(
    "path",
    sorted((DASHBOARDS / "grafana").glob("*.json")),
    ids=lambda path: path.stem,
)
def test_every_query_of_every_panel_has_data(query, path):
    panels = json.loads(path.read_text())["panels"]
    expressions = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    assert len(expressions) > 10
    expressions = [one for one in expressions if not one.startswith(NOT_HERE)]
    asked = [
        one.replace("$__rate_interval", "30s").replace("$run", "watched") for one in expressions
    ]
    assert unanswered(query, asked) == []


def test_every_rule_reads_metrics_that_have_data(query):
    rules = [
        rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]
    ]
    assert unanswered(query, [rule["record"] for rule in rules if "record" in rule]) == []
    alerts = [rule["expr"] for rule in rules if "alert" in rule]
    for expression in alerts:
        query(expression)  # raises where it is wrong; data would be an alert

    names = {
        name
        for expression in alerts
        for name in re.findall(r"run:[\w:]+|eopd_\w+|\bup\b", expression)
    }
    assert len(names) > 8
    assert unanswered(query, sorted(names)) == []


def test_prometheus_knows_the_step_of_the_run_and_sees_it_going_on(query, run):
    def step():
        (found,) = query('eopd_step{run="watched"}')
        return int(found["value"][1])

    first = step()
    assert 0 < first <= run.rows()[-1]["step"]
    run.goes_on(2)
    deadline = time.monotonic() + ANSWER_S
    while step() <= first:
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_rays_own_metrics_are_scraped_as_a_job_of_their_own(query):
    assert (
        unanswered(query, ['ray_node_mem_used{job="ray"}', 'ray_object_store_memory{job="ray"}'])
        == []
    )


@pytest.mark.parametrize("role", ["rollout-0", "teacher-.+-0"])
def test_vllms_metrics_of_an_engine_are_among_rays(query, role):
    """What only a working engine counts, and a gauge."""
    which = f'{{job="ray",ReplicaId=~"{role}"}}'
    assert (
        unanswered(
            query,
            [f"ray_vllm_prompt_tokens_total{which} > 0", f"ray_vllm_kv_cache_usage_perc{which}"],
        )
        == []
    )


def test_a_metric_that_is_not_there_has_no_data(query):
    assert query("eopd_no_such_metric") == []


def test_a_healthy_run_raises_no_alert_of_a_fault(query):
    assert query("ALERTS") == []  # nor is any pending
