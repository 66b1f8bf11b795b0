"""Make ``grafana/*.json`` from ``boards.py`` and the metric catalogue, and ``prometheusrule.yaml`` from
``rules/eopd.yml``: ``make dashboards``.

The JSON is Grafana's classic model as ``grafana-foundation-sdk`` writes it for version 11.6. The YAML
holds the same rules as an object of Kubernetes, for the Prometheus operator.
"""

import itertools
import json
import re
from pathlib import Path
from string import ascii_uppercase
from typing import Final

import yaml
from boards import BOARDS, METRICS, Board, Panel
from grafana_foundation_sdk.builders import common, prometheus, stat, timeseries
from grafana_foundation_sdk.builders import dashboard as grafana
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as options
from grafana_foundation_sdk.models import dashboard as models
from others import OTHERS

from eopd.telemetry.metric import Unit

FOLDER: Final = Path(__file__).parent
SELECTOR: Final = '{run=~"$run"}'
DATASOURCE: Final = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
WIDTH: Final = 24

# Grafana's names of the catalogue's units.
UNITS: Final[dict[Unit, str]] = {
    "nats": "suffix:nats",
    "ratio": "percentunit",
    "seconds": "s",
    "bytes": "bytes",
    "tokens": "short",
    "tokens per second": "suffix:tokens/s",
    "FLOP per second": "flops",
    "trajectories": "short",
    "steps": "none",
    "versions": "none",
    "dimensionless": "none",
}


def build(board: Board) -> str:
    """The file's text."""
    made = (
        grafana.Dashboard(board.title)
        .uid(board.uid)
        .description(board.description)
        .tags(["eopd"])
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .refresh("10s")
        .time("now-1h", "now")
        .with_variable(
            grafana.DatasourceVariable("datasource").label("Prometheus").type("prometheus")
        )
        .with_variable(_run())
        .link(
            grafana.DashboardLink("eopd")
            .type(models.DashboardLinkType.DASHBOARDS)
            .tags(["eopd"])
            .include_vars(True)
            .keep_time(True)
        )
    )
    ids = itertools.count(1)

    for heading, lines in board.rows.items():
        made.with_row(grafana.Row(heading).id(next(ids)))
        for line in lines:
            for panel in line:
                made.with_panel(_panel(panel, WIDTH // len(line)).id(next(ids)))

    return json.dumps(made.build(), cls=JSONEncoder, indent=2) + "\n"


def _run() -> grafana.QueryVariable:
    return (
        grafana.QueryVariable("run")
        .label("Run")
        .datasource(DATASOURCE)
        .query("label_values(eopd_batches, run)")
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_DESC)
        .multi(True)
    )


def _panel(panel: Panel, width: int) -> stat.Panel | timeseries.Panel:
    made = _stat() if panel.kind == "stat" else _lines(panel.stacked)
    for letter, name in zip(ascii_uppercase, panel.metrics, strict=False):
        made.with_target(_target(panel, name).ref_id(letter))

    unit = (
        "dateTimeFromNow"
        if all(name.endswith("_timestamp_seconds") for name in panel.metrics)
        else UNITS[panel.unit]
    )

    return (
        made.title(panel.title)
        .description(
            "\n\n".join(
                f"`{n}`: {METRICS[n].meaning} Healthy: {METRICS[n].healthy}" for n in panel.metrics
            )
        )
        .datasource(DATASOURCE)
        .unit(unit)
        .span(width)
        .height(4 if panel.kind == "stat" else 8)
    )


def _target(panel: Panel, name: str) -> prometheus.Dataquery:
    """A query and its legend; a stat is one number a run. What others measure has no label ``run``."""
    # Grafana's times are ms
    factor = " * 1000" if name.endswith("_timestamp_seconds") else ""
    other = OTHERS.get(name)
    legend = ["{{run}}"] if other is None else []
    if panel.kind != "stat":
        legend += [
            *(f"{{{{{label}}}}}" for label in METRICS[name].labels),
            re.sub("^(eopd_|ray_vllm_|ray_node_|vllm:)", "", name).replace("_", " "),
        ]

    selector = SELECTOR if other is None else other.selector
    expression = panel.query.format(name + selector) + factor

    return (
        prometheus.Dataquery()
        .expr(expression)
        .legend_format(" ".join(legend))
        .range()
        .datasource(DATASOURCE)
    )


def _stat() -> stat.Panel:
    last = common.ReduceDataOptions().calcs(["lastNotNull"])
    return (
        stat.Panel()
        .reduce_options(last)
        .graph_mode(options.BigValueGraphMode.AREA)
        .color_mode(options.BigValueColorMode.NONE)
    )


def _lines(stacked: bool) -> timeseries.Panel:
    mode = options.StackingMode.NORMAL if stacked else options.StackingMode.NONE
    return (
        timeseries.Panel()
        .line_width(2)
        .fill_opacity(30 if stacked else 0)
        .stacking(common.StackingConfig().mode(mode))
        .legend(common.VizLegendOptions().show_legend(True))
        .tooltip(common.VizTooltipOptions().mode(options.TooltipDisplayMode.MULTI))
    )


class _Dumper(yaml.SafeDumper):
    """Writes a text of several lines as it is."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None
    ),
)


def prometheus_rule() -> str:
    """The alert and recording rules as a PrometheusRule."""
    rules = yaml.safe_load((FOLDER / "rules" / "eopd.yml").read_text(encoding="utf-8"))
    resource = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "eopd"},
        "spec": rules,
    }
    header = "# Made from rules/eopd.yml by `make dashboards`; kustomization.yaml applies it.\n"

    return header + yaml.dump(resource, Dumper=_Dumper, sort_keys=False, width=120)


def render() -> dict[str, str]:
    """Texts by file name, below the folder of this file."""
    boards = {f"grafana/{board.uid.removeprefix('eopd-')}.json": build(board) for board in BOARDS}

    return boards | {"prometheusrule.yaml": prometheus_rule()}


if __name__ == "__main__":
    for name, text in render().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
