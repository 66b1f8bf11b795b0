"""Dashboards and catalogue name the same metrics; the committed JSON is what the code makes."""

import json
import re
import runpy
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from eopd.telemetry.catalog import CATALOG
from eopd.telemetry.metric import Metric


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


ROOT = Path(__file__).parents[2]
DASHBOARDS = ROOT / "dashboards"
GRAFANA = DASHBOARDS / "grafana"
GROUPS = read_yaml(DASHBOARDS / "rules" / "eopd.yml")["groups"]
RULES = [rule for group in GROUPS for rule in group["rules"]]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
RECORDED = {rule["record"] for rule in RULES if "record" in rule}
BOARDS = {
    path.name: json.loads(path.read_text(encoding="utf-8"))
    for path in sorted(GRAFANA.glob("*.json"))
}
PROMETHEUS_OWN = {"up"}
_OTHERS = runpy.run_path(str(DASHBOARDS / "others.py"))["OTHERS"]  # what vLLM and Ray measure
SELECTORS: dict[str, str] = {name: other.selector for name, other in _OTHERS.items()}
OTHERS: dict[str, Metric] = {name: other.metric for name, other in _OTHERS.items()}

every_board = pytest.mark.parametrize("board", BOARDS.values(), ids=BOARDS)


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def expressions(board: dict[str, Any]) -> Iterator[str]:
    for panel in panels(board):
        yield from (target["expr"] for target in panel["targets"])

    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["query"]


def metrics_of(expression: str) -> set[str]:
    """The metric names of a PromQL expression: identifiers that are no function, keyword,
    label or range.
    """
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\"[^\"]*\"", " ", expression)
    bare = re.sub(
        r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)",
        " ",
        bare,
    )
    bare = re.sub(r"label_values\((\w+),\s*\w+\)", r"\1", bare)
    words = re.findall(r"\b[A-Za-z_:][\w:]*(?!\w*\s*\()", bare)
    return set(words) - {"and", "or", "unless", "bool", "offset", "group_left"}


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ('sum by (run, reason) (rate(a_total{run=~"$run"}[5m])) / on (run) b', {"a_total", "b"}),
        ("label_values(a, run)", {"a"}),
        ('histogram_quantile(0.5, a{x="y"}) and b offset 5m > bool 1', {"a", "b"}),
    ],
)
def test_the_reader_of_expressions_finds_metrics_only(expression: str, names: set[str]) -> None:
    assert metrics_of(expression) == names


def test_the_committed_dashboards_are_what_the_code_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DASHBOARDS))
    made = runpy.run_path(str(DASHBOARDS / "build.py"))["render"]()
    written = [*GRAFANA.glob("*.json"), DASHBOARDS / "prometheusrule.yaml"]
    committed = {
        str(path.relative_to(DASHBOARDS)): path.read_text(encoding="utf-8") for path in written
    }
    assert committed == made, "make dashboards"
    assert len(made) == 5


def test_dashboards_and_catalogue_name_the_same_metrics() -> None:
    drawn: set[str] = set()
    for board in BOARDS.values():
        for expression in expressions(board):
            drawn |= metrics_of(expression)

    assert drawn == set(CATALOG) | set(OTHERS)


@every_board
def test_every_query_is_of_the_chosen_run(board: dict[str, Any]) -> None:
    for panel in panels(board):
        for target in panel["targets"]:
            (name,) = metrics_of(target["expr"])
            selector = SELECTORS.get(name, '{run=~"$run"}')
            assert f"{name}{selector}" in target["expr"]
            assert target["datasource"]["uid"] == "${datasource}"
            assert panel["datasource"]["uid"] == "${datasource}"

    # a query variable comes after the data source it needs
    source, run = board["templating"]["list"]
    assert source["name"] == "datasource"
    assert source["type"] == "datasource"
    assert run["name"] == "run"
    assert run["type"] == "query"


@every_board
def test_every_panel_says_what_it_shows_and_in_what_unit(board: dict[str, Any]) -> None:
    for panel in panels(board):
        assert panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"]

        for target in panel["targets"]:
            (name,) = metrics_of(target["expr"])
            metric = CATALOG[name] if name in CATALOG else OTHERS[name]
            assert metric.meaning in panel["description"]
            assert metric.healthy in panel["description"]

        references = [target["refId"] for target in panel["targets"]]
        assert references
        assert len(set(references)) == len(references)


@every_board
def test_panels_have_ids_of_their_own_and_lie_side_by_side(board: dict[str, Any]) -> None:
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()

    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert cells and max(x for x, _ in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells


# --- rules


def test_rules_name_metrics_that_are_there() -> None:
    there = CATALOG.keys() | RECORDED | PROMETHEUS_OWN
    for rule in RULES:
        named = metrics_of(rule["expr"])
        assert named and named <= there, rule


def test_every_alert_leads_to_its_paragraph_of_the_runbook() -> None:
    text = (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8")
    anchors = {title.lower().replace(" ", "-") for title in re.findall(r"^## (.+)$", text, re.M)}
    assert len(anchors) == len(ALERTS)

    for name, alert in ALERTS.items():
        annotations = alert["annotations"]
        assert set(annotations) == {"summary", "description", "runbook_url"}
        title = re.sub("(?<!^)(?=[A-Z])", "-", name.removeprefix("Eopd")).lower()
        base = '{{ or $externalLabels.runbook "docs/runbook.md" }}'
        assert annotations["runbook_url"] == f"{base}#{title}"
        assert title in anchors

    for paragraph in text.split("\n## ")[1:]:
        assert "**Confirm:**" in paragraph
        assert "**Do:**" in paragraph


def test_the_runbook_names_metrics_and_keys_that_are_there() -> None:
    text = (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`(eopd_\w+)`", text)) <= set(CATALOG)
    file = ROOT / "tests" / "house" / "knobs.txt"
    knobs = file.read_text(encoding="utf-8").replace("[]", "").split()
    sections = "run|rollout|teachers|learner|loss|flow|weights|student"
    keys = re.findall(rf"`((?:{sections})(?:\[\])?\.\w+)", text)
    assert keys
    for key in keys:
        plain = key.replace("[]", "")
        assert any(f"{knob}.".startswith(f"{plain}.") for knob in knobs), key


NO_PROMTOOL = shutil.which("promtool") is None


@pytest.mark.skipif(NO_PROMTOOL, reason="promtool comes with Debian's prometheus")
@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "rules", "dashboards/rules/eopd.yml"),
        ("check", "config", "dashboards/prometheus.yml"),
        ("test", "rules", "tests/house/rules/eopd.test.yml"),
    ],
)
def test_promtool_finds_the_rules_right(arguments: tuple[str, ...]) -> None:
    command = ["promtool", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(
    shutil.which("amtool") is None, reason="amtool comes with Debian's prometheus-alertmanager"
)
def test_amtool_finds_the_example_of_an_alertmanager_right() -> None:
    command = ["amtool", "check-config", "dashboards/alertmanager.yml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(
    shutil.which("amtool") is None, reason="amtool comes with Debian's prometheus-alertmanager"
)
@pytest.mark.parametrize(("severity", "receiver"), [("critical", "on-call"), ("warning", "team")])
def test_every_severity_has_its_receiver(severity: str, receiver: str) -> None:
    assert severity in {alert["labels"]["severity"] for alert in ALERTS.values()}
    command = ["amtool", "config", "routes", "test", f"severity={severity}", "run=r"]
    command.append("--config.file=dashboards/alertmanager.yml")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == receiver, done.stderr


def test_the_alertmanager_knows_alerts_that_are_there() -> None:
    config = read_yaml(DASHBOARDS / "alertmanager.yml")
    named = {
        name
        for rule in config["inhibit_rules"]
        for matchers in rule.values()
        for matcher in matchers
        for name in re.findall(r"Eopd\w+", matcher)
    }
    assert named and named <= set(ALERTS)


def test_no_rule_selects_by_the_name_of_a_scrape_job() -> None:
    for rule in RULES:
        assert "job" not in rule["expr"], rule
        assert not re.search(r"\bup\b(?!\{teacher)", rule["expr"]), rule


def test_every_alert_is_unit_tested() -> None:
    file = ROOT / "tests" / "house" / "rules" / "eopd.test.yml"
    tests = file.read_text(encoding="utf-8")
    for name in ALERTS.keys() - {"EopdStalled"}:
        assert f'alertname="{name}", alertstate="firing"' in tests

    assert 'alertname="EopdStalled", alertstate="firing"' not in tests
    assert "alertname: EopdStalled" in tests


# --- what is mounted where


def test_prometheus_scrapes_the_driver_as_often_as_grafana_believes() -> None:
    scrape = read_yaml(DASHBOARDS / "prometheus.yml")
    jobs = {job["job_name"]: job for job in scrape["scrape_configs"]}
    assert list(jobs) == ["eopd", "ray"]
    (discovery,) = jobs["eopd"]["file_sd_configs"]
    (pattern,) = discovery["files"]
    assert (DASHBOARDS / pattern).parent.is_dir()
    assert jobs["eopd"]["honor_labels"]
    assert [path for pattern in scrape["rule_files"] for path in DASHBOARDS.glob(pattern)]
    provisioning = GRAFANA / "provisioning"
    (source,) = read_yaml(provisioning / "datasources" / "prometheus.yml")["datasources"]
    assert source["type"] == "prometheus"
    assert source["jsonData"]["timeInterval"] == scrape["global"]["scrape_interval"]
    (provider,) = read_yaml(provisioning / "dashboards" / "eopd.yml")["providers"]
    assert provider["type"] == "file"


def test_compose_mounts_what_exists_where_it_is_looked_for() -> None:
    services = read_yaml(DASHBOARDS / "compose.yml")["services"]
    inside = set()
    volumes = set(read_yaml(DASHBOARDS / "compose.yml")["volumes"])
    for service in services.values():
        assert service["network_mode"] == "host"  # all addresses are 127.0.0.1
        for mount in service["volumes"]:
            host, path, *_ = mount.split(":")
            assert host in volumes or (DASHBOARDS / host).exists()
            inside.add(path)

    scrape = read_yaml(DASHBOARDS / "prometheus.yml")
    (address,) = scrape["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"]
    assert f"--web.listen-address={address}" in services["alertmanager"]["command"]
    assert {"/etc/prometheus/targets", "/etc/alertmanager/alertmanager.yml"} <= inside

    (provider,) = read_yaml(GRAFANA / "provisioning" / "dashboards" / "eopd.yml")["providers"]
    assert provider["options"]["path"] in inside
    assert "/etc/grafana/provisioning" in inside
    with_ray = read_yaml(DASHBOARDS / "compose.ray.yml")["services"]
    # where prometheus.yml looks for Ray's file
    assert with_ray["prometheus"] == {"volumes": ["/tmp/ray:/tmp/ray:ro"]}


# --- objects of Kubernetes


def test_prometheus_operator_gets_the_same_rules() -> None:
    rule = read_yaml(DASHBOARDS / "prometheusrule.yaml")
    assert rule["kind"] == "PrometheusRule"
    assert rule["spec"] == {"groups": GROUPS}


def test_every_board_is_a_config_map_that_kubectl_can_apply() -> None:
    made = read_yaml(DASHBOARDS / "kustomization.yaml")
    maps = made["configMapGenerator"]
    files = [file for config_map in maps for file in config_map["files"]]
    assert sorted(files) == [f"grafana/{name}" for name in BOARDS]
    assert made["generatorOptions"]["labels"] == {"grafana_dashboard": "1"}

    for config_map in maps:
        # kubectl's annotation holds the ConfigMap as JSON, with the board as a text inside
        texts = [(DASHBOARDS / file).read_text(encoding="utf-8") for file in config_map["files"]]
        assert len(json.dumps(json.dumps(texts))) < 256 * 1024
