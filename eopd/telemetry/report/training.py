"""Draws the metrics of training over its steps, judged by their healthy ranges, with marks where
something happened. Charts that say nothing become a line of a list.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from eopd.telemetry.report import charts
from eopd.telemetry.report.charts import Mark
from eopd.telemetry.report.figure import Figure
from eopd.telemetry.report.groups import Group, legend_of, lines_of
from eopd.telemetry.report.healthy import HEALTHY, Range, Verdict, judge, number
from eopd.telemetry.report.lines import Line, is_flat
from eopd.telemetry.report.reading import RunRecord
from eopd.telemetry.series import parse_series

POINTS: Final = 1200  # of one metric over all runs


@dataclass(frozen=True, slots=True)
class Chart:
    """What a chart shows: metrics, with what the legend calls them. One that is ``optional`` is
    left out of a run without its numbers, and is not missed.
    """

    title: str
    metrics: Mapping[str, str]
    optional: bool = False


_MOST_MARKS: Final = 200  # more checkpoints than these would be one bar

# By importance.
CHARTS: Final = (
    Chart("Reverse KL (nats)", {"eopd_reverse_kl_nats": "reverse KL"}),
    Chart(
        "Forward KL (nats)",
        {"eopd_forward_kl_gated_nats": "gate open", "eopd_forward_kl_ungated_nats": "gate shut"},
    ),
    Chart("Gate open (share of tokens)", {"eopd_gate_ratio": "gate"}),
    Chart(
        "Entropy (nats)",
        {"eopd_teacher_entropy_nats": "teacher", "eopd_student_entropy_nats": "student"},
    ),
    Chart("Loss (nats)", {"eopd_loss": "loss"}, optional=True),
    Chart("Reward", {"eopd_reward_mean": "reward"}, optional=True),
    Chart("Response length (tokens)", {"eopd_response_tokens_mean": "length"}),
    Chart("Ended by itself (share)", {"eopd_end_token_ratio": "ended"}),
    Chart(
        "Written before (share of runs of four tokens)",
        {"eopd_repetition_ratio": "repetition"},
        optional=True,
    ),
    Chart(
        "Mass on the teacher's top k",
        {"eopd_teacher_topk_mass_ratio": "teacher", "eopd_student_topk_mass_ratio": "student"},
    ),
    Chart("Top k in common (share)", {"eopd_topk_overlap_ratio": "overlap"}),
    Chart("Gradient norm", {"eopd_grad_norm": "norm"}),
    Chart("Learning rate", {"eopd_learning_rate": "rate"}, optional=True),
    Chart(
        "Clipped (share of tokens)",
        {"eopd_clipped_ratio": "ratio clipped"},
        optional=True,
    ),
    Chart(
        "Capped (share of tokens)",
        {"eopd_importance_capped_ratio": "weight capped"},
        optional=True,
    ),
    Chart(
        "Gate left open by bounds (share)",
        {"eopd_gate_uncertain_ratio": "uncertain"},
        optional=True,
    ),
    Chart("Engine against learner (nats)", {"eopd_logprob_gap_nats": "|log p - log b|"}),
    Chart(
        "Staleness (versions)",
        {"eopd_staleness_mean": "mean", "eopd_staleness_max": "oldest token"},
    ),
    Chart("Response tokens per second", {"eopd_response_tokens_per_second": "rate"}),
    Chart("Checkpoint (seconds)", {"eopd_checkpoint_seconds": "newest"}, optional=True),
)


@dataclass(frozen=True, slots=True)
class Training:
    """The charts of training; ``folded`` are lines in the place of charts that say nothing."""

    figures: Sequence[Figure]
    folded: Sequence[str]
    marks: Mapping[str, str]  # what the marks in the charts mean, by kind


def training(groups: Sequence[Group]) -> Training:
    """Draws everything that was recorded of training."""
    runs = [run for group in groups for run in group.runs]
    marks = sorted({mark for run in runs for mark in marks_of(run, alone=len(runs) == 1)})
    figures, folded = [], []

    for chart in [*CHARTS, *_lost(runs)]:
        lines = lines_of(groups, chart.metrics, _line)
        drawn = [line for line in lines if line.points()]
        verdicts = _verdicts(chart, groups)
        if not drawn:
            folded += [] if chart.optional else [f"{chart.title}: no numbers"]
        elif verdicts or not all(map(_is_constant, drawn)):
            figures.append(_figure(chart, groups, lines, verdicts, marks))
        else:
            folded.append(f"{chart.title}: {_constants(chart, drawn)}")

    kinds = {mark.kind for mark in marks}
    return Training(
        figures, folded, {kind: words for kind, words in charts.MARK_KINDS.items() if kind in kinds}
    )


def marks_of(run: RunRecord, *, alone: bool) -> list[Mark]:
    """Returns what happened in a run. Checkpoints and the best are marked where it is shown
    ``alone``, since every run has some.
    """
    marks = [Mark(change["from_step"], "changed") for change in run.changes]
    rows = [row for row in run.timeline.values() if "incarnation" in row]
    for before, after in itertools.pairwise(rows):
        if before["incarnation"] != after["incarnation"]:
            marks.append(Mark(after["step"], "restart"))

    marks += [Mark(step, "collapse") for step in collapses(run)]
    if alone:
        written = list(run.checkpoints())
        marks += [Mark(step, "checkpoint") for step in written if len(written) <= _MOST_MARKS]
        marks += [Mark(run.summary.best.step, "best")] if run.summary.best else []

    return marks


def collapses(run: RunRecord) -> list[int]:
    """Returns the steps at which signs of a collapse began to show."""
    signs = [bool(value) for value in run.column("eopd_collapse")]
    turns = zip(run.steps, signs, [False, *signs], strict=False)
    return [step for step, sign, before in turns if sign and not before]


def breaches(run: RunRecord) -> list[str]:
    """Returns the titles of the charts in which a run is outside of a healthy range."""
    alone = [Group(run.name, [run])]
    found = []
    for chart in CHARTS:
        if any(verdict.is_breach for verdict in _verdicts(chart, alone)):
            found.append(chart.title.partition(" (")[0])

    return found


def _lost(runs: Sequence[RunRecord]) -> list[Chart]:
    """Returns the chart of the trajectories that were lost, by reason, where some were."""
    positive = {
        name
        for run in runs
        for row in run.rows
        for name, value in row.items()
        if value and name.startswith("eopd_lost_trajectories_total")
    }
    reasons = {name: parse_series(name)[1]["reason"] for name in sorted(positive)}
    return [Chart("Lost trajectories", reasons, optional=True)] if reasons else []


def _line(group: Group, name: str) -> Line:
    line = group.line(lambda run: dict(zip(run.steps, run.column(name), strict=True)))
    return replace(line, healthy=_healthy(name, group.runs[0]))


def _healthy(name: str, run: RunRecord) -> Range | None:
    healthy = HEALTHY.get(name)
    return healthy if healthy and healthy.is_for(run.config) else None


def _verdicts(chart: Chart, groups: Sequence[Group]) -> list[Verdict]:
    """Judges every metric of a chart in every group."""
    verdicts = []
    for group in groups:
        for name, label in chart.metrics.items():
            if (healthy := _healthy(name, group.runs[0])) is not None:
                what = f"{group.label}, {label}" if len(groups) > 1 else label.capitalize()
                line = _line(group, name)
                verdicts.append(judge(what, line.xs, line.ys, healthy, _percent(chart)))

    return [verdict for verdict in verdicts if verdict is not None]


def _percent(chart: Chart) -> bool:
    return all(parse_series(name)[0].unit == "ratio" for name in chart.metrics)


def _is_constant(line: Line) -> bool:
    """Returns whether a line has several values, all the same."""
    return len(line.points()) > 1 and is_flat(line)


def _constants(chart: Chart, lines: Sequence[Line]) -> str:
    values = {line.label: number(line.points()[0][1], _percent(chart)) for line in lines}
    if len(set(values.values())) == 1:
        return f"{next(iter(values.values()))} all along"

    return f"{', '.join(f'{label} {value}' for label, value in values.items())}, all along"


def _figure(
    chart: Chart,
    groups: Sequence[Group],
    lines: Sequence[Line],
    verdicts: Sequence[Verdict],
    marks: Sequence[Mark],
) -> Figure:
    note = " ".join(dict.fromkeys(parse_series(name)[0].healthy for name in chart.metrics))
    picture = charts.curves(
        chart.title,
        lines,
        percent=_percent(chart),
        num_points=min(max(POINTS // len(groups), 40), 300),
        marks=marks,
    )
    return Figure(chart.title, picture, note, legend_of(groups, chart.metrics), verdicts)
