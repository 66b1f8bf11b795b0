"""Make ``grafana/overview.json`` from the metric catalogue: ``python dashboards/build.py``.

A panel here is a title and the metrics it draws; units, descriptions and healthy ranges come from the catalogue, so
that they are written once. The JSON is Grafana's classic model, read by version 11 and later.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from eopd.telemetry.catalog import CATALOG, Unit

Json = dict[str, object]

TARGET: Final = Path(__file__).parent / "grafana" / "overview.json"
GRID_WIDTH: Final = 24
DATASOURCE: Final[Json] = {"type": "prometheus", "uid": "${datasource}"}
SELECTOR: Final = '{run=~"$run"}'

# Grafana's names of the catalogue's units.
UNITS: Final[dict[Unit, str]] = {
    "nats": "suffix:nats",
    "ratio": "percentunit",
    "seconds": "s",
    "bytes": "bytes",
    "tokens": "short",
    "tokens per second": "suffix:tokens/s",
    "trajectories": "short",
    "steps": "none",
    "versions": "none",
    "dimensionless": "none",
}


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel: all its metrics have one unit. ``width`` is in 24ths of the screen."""

    title: str
    metrics: tuple[str, ...]
    kind: Literal["timeseries", "stat"] = "timeseries"
    width: int = 6
    stacked: bool = False


def _stat(title: str, metric: str) -> Panel:
    return Panel(title, (metric,), kind="stat", width=4)


# What a step is made of, one after the other.
LEARNERS_STEP: Final = (
    "eopd_wait_rollout_seconds",
    "eopd_wait_teacher_seconds",
    "eopd_train_seconds",
    "eopd_weights_seconds",
)

OVERVIEW: Final[dict[str, tuple[Panel, ...]]] = {
    "Is it healthy": (
        _stat("Step", "eopd_step"),
        _stat("Reverse KL", "eopd_reverse_kl_nats"),
        _stat("Gate open", "eopd_gate_ratio"),
        _stat("Ended by itself", "eopd_end_token_ratio"),
        _stat("Response tokens per second", "eopd_response_tokens_per_second"),
        _stat("Lost trajectories", "eopd_lost_trajectories_total"),
        Panel("KL", ("eopd_reverse_kl_nats", "eopd_forward_kl_nats"), width=8),
        Panel("Entropy", ("eopd_teacher_entropy_nats", "eopd_student_entropy_nats"), width=8),
        Panel("Gate open", ("eopd_gate_ratio",), width=8),
    ),
    "Where the time goes": (
        Panel("Step, and the wait in it", ("eopd_step_seconds", "eopd_wait_seconds")),
        Panel("Learner's step", LEARNERS_STEP, stacked=True),
        Panel("One trajectory", ("eopd_generate_seconds", "eopd_score_seconds")),
        Panel("Response tokens per second", ("eopd_response_tokens_per_second",)),
    ),
    "Responses and flow": (
        Panel("Response length", ("eopd_response_tokens_mean",)),
        Panel("How responses end", ("eopd_end_token_ratio", "eopd_truncated_ratio")),
        Panel("Queues", ("eopd_in_flight_trajectories", "eopd_ready_trajectories")),
        Panel("Staleness", ("eopd_staleness_mean", "eopd_staleness_max")),
        Panel("Trajectories trained on", ("eopd_trajectories_total",), width=8),
        Panel("Response tokens trained on", ("eopd_response_tokens_total",), width=8),
        Panel("Lost trajectories", ("eopd_lost_trajectories_total",), width=8),
    ),
    "Distillation": (
        Panel("Loss", ("eopd_loss",), width=8),
        Panel(
            "Forward KL inside and outside the gate",
            ("eopd_forward_kl_gated_nats", "eopd_forward_kl_ungated_nats"),
            width=8,
        ),
        Panel("Gate left open by bounds", ("eopd_gate_uncertain_ratio",), width=8),
        Panel("Mass on the teacher's top k", ("eopd_teacher_topk_mass_ratio", "eopd_student_topk_mass_ratio"), width=8),
        Panel("Top-k overlap", ("eopd_topk_overlap_ratio",), width=8),
        Panel("Reward", ("eopd_reward_mean",), width=8),
    ),
    "Optimisation": (
        Panel("Importance weight", ("eopd_importance_weight_mean",)),
        Panel("Capped and clipped tokens", ("eopd_importance_capped_ratio", "eopd_clipped_ratio")),
        Panel("Log-probability gap", ("eopd_logprob_gap_nats",)),
        Panel("Gradient norm", ("eopd_grad_norm",)),
        Panel("Learning rate", ("eopd_learning_rate",)),
        Panel("Alpha", ("eopd_alpha_ratio",)),
        Panel("Loss tokens", ("eopd_loss_tokens",)),
        Panel("Skipped optimiser steps", ("eopd_skipped_steps_total",)),
    ),
    "Teachers": (
        Panel("Tokens scored", ("eopd_teacher_tokens_total",)),
        Panel("In flight", ("eopd_teacher_in_flight_trajectories",)),
        Panel("Replicas that take work", ("eopd_teacher_replicas_up",)),
        Panel("Failures", ("eopd_teacher_failures_total",), width=3),
        Panel("Replacements", ("eopd_teacher_replacements_total",), width=3),
    ),
    "Faults": (
        Panel("Engines that take work", ("eopd_engines_up",)),
        Panel("Failures and replacements of engines", ("eopd_engine_failures_total", "eopd_engine_replacements_total")),
        Panel("Learner restarts", ("eopd_learner_restarts_total",)),
        Panel("Failed weight transfers", ("eopd_weight_failures_total",)),
        Panel("Object store", ("eopd_object_store_bytes",)),
    ),
    "Weight sync": (
        Panel("Transfer", ("eopd_weight_transfer_seconds",), width=8),
        Panel("Pause", ("eopd_weight_pause_seconds",), width=8),
        Panel("Engine against learner", ("eopd_weight_probe_nats",), width=8),
        Panel("Size", ("eopd_weight_bytes",), width=8),
    ),
}


def overview() -> Json:
    """The dashboard as Grafana's JSON."""
    return {
        "uid": "eopd-overview",
        "title": "eopd overview",
        "description": "A distillation run: is it healthy, and where does the time go?",
        "tags": ["eopd"],
        "editable": True,
        "graphTooltip": 1,
        "schemaVersion": 39,
        "version": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "annotations": {"list": []},
        "links": [],
        "templating": {"list": [_datasource_variable(), _run_variable()]},
        "panels": _panels(),
    }


def _datasource_variable() -> Json:
    return {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus", "hide": 0}


def _run_variable() -> Json:
    query = "label_values(eopd_step, run)"
    return {
        "name": "run",
        "label": "Run",
        "type": "query",
        "datasource": DATASOURCE,
        "definition": query,
        "query": {"query": query, "refId": "run"},
        "refresh": 2,  # when the time range changes
        "sort": 2,  # alphabetical, descending
        "multi": True,
        "includeAll": False,
        "hide": 0,
    }


def _panels() -> list[Json]:
    """Rows and panels in reading order, laid out left to right."""
    panels: list[Json] = []
    y = 0
    for heading, group in OVERVIEW.items():
        place = {"x": 0, "y": y, "w": GRID_WIDTH, "h": 1}
        panels.append({"id": len(panels) + 1, "type": "row", "title": heading, "collapsed": False, "gridPos": place})
        panels[-1]["panels"] = []
        y += 1
        x = height = 0
        for panel in group:
            if x + panel.width > GRID_WIDTH:
                x, y = 0, y + height
            height = 4 if panel.kind == "stat" else 8
            place = {"x": x, "y": y, "w": panel.width, "h": height}
            panels.append({"id": len(panels) + 1, "gridPos": place, **_panel(panel)})
            x += panel.width
        y += height
    return panels


def _panel(panel: Panel) -> Json:
    (unit,) = {CATALOG[name].unit for name in panel.metrics}
    stat = panel.kind == "stat"
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": _description(panel.metrics),
        "datasource": DATASOURCE,
        "targets": [_target(name, chr(ord("A") + i), whole=stat) for i, name in enumerate(panel.metrics)],
        "fieldConfig": {
            "defaults": {"unit": UNITS[unit], "custom": {} if stat else _lines(panel.stacked)},
            "overrides": [],
        },
        "options": _stat_options() if stat else _series_options(),
    }


def _description(names: Sequence[str]) -> str:
    return "\n\n".join(f"`{name}`: {CATALOG[name].meaning} Healthy: {CATALOG[name].healthy}" for name in names)


def _target(name: str, reference: str, *, whole: bool) -> Json:
    """A query; ``whole`` sums a metric's own labels away, so that a stat is one number a run."""
    labels = CATALOG[name].labels
    expression = f"{name}{SELECTOR}"
    legend = " ".join(["{{run}}", *(f"{{{{{label}}}}}" for label in labels)])
    if labels and whole:
        expression, legend = f"sum by (run) ({expression})", "{{run}}"
    return {
        "refId": reference,
        "datasource": DATASOURCE,
        "expr": expression,
        "legendFormat": legend if whole else f"{legend} {_short(name)}",
        "range": True,
    }


def _short(name: str) -> str:
    return name.removeprefix("eopd_").replace("_", " ")


def _lines(stacked: bool) -> Json:
    stacking = {"mode": "normal" if stacked else "none", "group": "A"}
    return {"drawStyle": "line", "lineWidth": 2, "fillOpacity": 30 if stacked else 0, "stacking": stacking}


def _series_options() -> Json:
    return {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "multi", "sort": "none"},
    }


def _stat_options() -> Json:
    return {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "colorMode": "none",
        "graphMode": "area",
        "textMode": "auto",
    }


def render() -> str:
    """The file's text."""
    return json.dumps(overview(), indent=2) + "\n"


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
