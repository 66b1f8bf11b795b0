"""What the terminal shows of a row of metrics: which of them, under which label, in which unit."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Final

from rich.table import Table

from eopd.run.record import Row
from eopd.telemetry.catalog import CATALOG
from eopd.telemetry.metric import Unit

Cell = tuple[str, tuple[str, ...]]

# Three columns of the live view: a label, and the metrics shown beside it.
COLUMNS: Final[tuple[tuple[Cell, ...], ...]] = (
    (
        ("step", ("eopd_step_seconds",)),
        ("  wait", ("eopd_wait_seconds",)),
        ("  train", ("eopd_train_seconds",)),
        ("  weights", ("eopd_weights_seconds",)),
        ("tokens/s", ("eopd_response_tokens_per_second",)),
    ),
    (
        ("reverse KL (nats)", ("eopd_reverse_kl_nats",)),
        ("forward KL (nats)", ("eopd_forward_kl_nats",)),
        ("teacher entropy (nats)", ("eopd_teacher_entropy_nats",)),
        ("student entropy (nats)", ("eopd_student_entropy_nats",)),
        ("gate open", ("eopd_gate_ratio",)),
    ),
    (
        ("response tokens", ("eopd_response_tokens_mean",)),
        ("ended by itself", ("eopd_end_token_ratio",)),
        ("in flight / ready", ("eopd_in_flight_trajectories", "eopd_ready_trajectories")),
        ("staleness / max", ("eopd_staleness_mean", "eopd_staleness_max")),
    ),
)

# What a plain line shows of a step, after its time.
LINE: Final[tuple[Cell, ...]] = (
    ("KL reverse / forward", ("eopd_reverse_kl_nats", "eopd_forward_kl_nats")),
    ("entropy teacher / student", ("eopd_teacher_entropy_nats", "eopd_student_entropy_nats")),
    ("gate", ("eopd_gate_ratio",)),
    ("length", ("eopd_response_tokens_mean",)),
    ("in flight / ready", ("eopd_in_flight_trajectories", "eopd_ready_trajectories")),
    ("staleness", ("eopd_staleness_max",)),
)

# What was lost and replaced.
FAULTS: Final[tuple[Cell, ...]] = (
    ("engines up / replaced", ("eopd_engines_up", "eopd_engine_replacements_total")),
    ("learner restarts", ("eopd_learner_restarts_total",)),
    ("failed weight transfers", ("eopd_weight_failures_total",)),
    ("skipped steps", ("eopd_skipped_steps_total",)),
)

_FORMATS: Final[Mapping[Unit, str]] = {
    "seconds": "{:.2f} s",
    "nats": "{:.3f}",
    "ratio": "{:.0%}",
    "tokens": "{:.1f}",
    "tokens per second": "{:.1f}",
    "trajectories": "{:.0f}",
    "versions": "{:.3g}",
    "steps": "{:.0f}",
    "dimensionless": "{:.4g}",
}


def cells(row: Row) -> Table:
    """Returns a table of a row of metrics, in the three columns of ``COLUMNS``."""
    table = Table.grid(padding=(0, 1), expand=True)
    for _ in COLUMNS:
        table.add_column(style="dim", no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        table.add_column(ratio=1)

    for line in itertools.zip_longest(*COLUMNS, fillvalue=("", ())):
        texts: list[str] = []
        for label, names in line:
            texts += [label, value(row, names), ""]

        table.add_row(*texts)

    return table


def value(row: Row, names: Sequence[str]) -> str:
    """Returns the text of a cell with one or more metrics."""
    return " / ".join(show(row, name) for name in names)


def show(row: Row, name: str) -> str:
    """Returns a metric in its unit, or a dash where the row lacks it."""
    return _FORMATS[CATALOG[name].unit].format(row[name]) if name in row else "-"
