"""Dashboards and catalogue name the same metrics; the committed JSON is what the code makes."""

import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from eopd.telemetry.catalog import CATALOG

DASHBOARDS = Path(__file__).parents[2] / "dashboards"
OVERVIEW = DASHBOARDS / "grafana" / "overview.json"


@pytest.fixture(scope="module")
def board() -> dict[str, Any]:
    return dict(json.loads(OVERVIEW.read_text(encoding="utf-8")))


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def expressions(board: dict[str, Any]) -> Iterator[str]:
    for panel in panels(board):
        yield from (target["expr"] for target in panel["targets"])
    yield from (variable["query"]["query"] for variable in board["templating"]["list"] if variable["type"] == "query")


def metrics_of(expression: str) -> set[str]:
    """The metric names of a PromQL expression: identifiers that are no function, keyword, label or range."""
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\"[^\"]*\"", " ", expression)
    bare = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", " ", bare)
    bare = re.sub(r"label_values\((\w+),\s*\w+\)", r"\1", bare)
    words = re.findall(r"\b[A-Za-z_:][\w:]*(?!\w*\s*\()", bare)
    return set(words) - {"and", "or", "unless", "bool", "offset"}


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


def test_the_committed_dashboard_is_what_the_code_makes() -> None:
    made = runpy.run_path(str(DASHBOARDS / "build.py"))["render"]()
    assert OVERVIEW.read_text(encoding="utf-8") == made, "run: python dashboards/build.py"


def test_dashboard_and_catalogue_name_the_same_metrics(board: dict[str, Any]) -> None:
    assert {name for expression in expressions(board) for name in metrics_of(expression)} == set(CATALOG)


def test_every_query_is_of_the_chosen_run(board: dict[str, Any]) -> None:
    for panel in panels(board):
        for target in panel["targets"]:
            assert '{run=~"$run"}' in target["expr"]
            assert target["datasource"]["uid"] == panel["datasource"]["uid"] == "${datasource}"
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert list(variables) == ["datasource", "run"], "a query variable comes after the data source it needs"
    assert (variables["datasource"]["type"], variables["run"]["type"]) == ("datasource", "query")


def test_every_panel_says_what_it_shows_and_in_what_unit(board: dict[str, Any]) -> None:
    for panel in panels(board):
        assert panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        for target in panel["targets"]:
            (name,) = metrics_of(target["expr"])
            assert CATALOG[name].meaning in panel["description"]
            assert CATALOG[name].healthy in panel["description"]
        references = [target["refId"] for target in panel["targets"]]
        assert references and len(set(references)) == len(references)


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


def test_grafana_reads_the_classic_model_of_version_11(board: dict[str, Any]) -> None:
    assert board["schemaVersion"] == 39
    assert 8 <= len(board["uid"]) <= 40
    assert {panel["type"] for panel in board["panels"]} <= {"row", "stat", "timeseries"}


def test_prometheus_scrapes_the_driver_as_often_as_grafana_believes() -> None:
    scrape = yaml.safe_load((DASHBOARDS / "prometheus.yml").read_text())
    (job,) = scrape["scrape_configs"]
    assert job["job_name"] == "eopd"
    assert job["static_configs"] == [{"targets": ["127.0.0.1:9400"]}]
    provisioning = DASHBOARDS / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert source["type"] == "prometheus"
    assert source["jsonData"]["timeInterval"] == scrape["global"]["scrape_interval"]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "eopd.yml").read_text())["providers"]
    assert provider["type"] == "file"
