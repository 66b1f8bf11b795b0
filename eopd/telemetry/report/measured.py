"""Draws what was measured on prompts that are never trained on: held-out numbers and benchmarks
over steps, with their 95 % intervals, and how sure student and teacher were before and after.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Final

from eopd.config.benchmark import HELD_OUT
from eopd.telemetry.report import charts
from eopd.telemetry.report.charts import Mark
from eopd.telemetry.report.figure import Figure
from eopd.telemetry.report.groups import Group, legend_of, lines_of
from eopd.telemetry.report.lines import Line, Points, is_flat
from eopd.telemetry.report.reading import RunRecord

PAPER_TAU: Final = 0.8  # nats
_HELD_OUT: Final[Mapping[str, Mapping[str, str]]] = {
    "Held-out reverse KL (nats)": {"reverse_kl": "reverse KL"},
    "Held-out forward KL (nats)": {"forward_kl": "forward KL"},
    "Held-out entropy (nats)": {"teacher_entropy": "teacher", "student_entropy": "student"},
    "Held-out top-1 agreement": {"top1_agreement": "agreement"},
}
_PASS_AT: Final = "pass_at_"  # of several k the largest is drawn
# Of a benchmark: how a metric's name begins, and the chart in which it is drawn.
BENCHMARK: Final[Mapping[str, str]] = {
    "avg_at_": "correct answers",
    _PASS_AT: "correct answers",
    "response_tokens": "response length (tokens)",
    "truncation_rate": "truncated (share)",
    "distinct_": "distinct n-grams (share)",
    "lost": "lost answers",
    "not_graded": "answers that were not graded",
}
_NUMBERS: Final = (
    "(nats)",
    "(tokens)",
    "lost answers",
    "answers that were not graded",
)  # what is no share


def measured(groups: Sequence[Group]) -> list[Figure]:
    """Draws every measurement that was made more than once."""
    runs = [run for group in groups for run in group.runs]
    figures = []
    for name, charts_of_name in _charts(runs).items():
        for title, metrics in charts_of_name.items():
            is_share = not title.endswith(_NUMBERS)
            lines = lines_of(groups, metrics, partial(_line, name, is_share))
            if not all(map(is_flat, lines)):
                marks = _best(runs, name, metrics)
                picture = charts.curves(
                    title,
                    lines,
                    percent=is_share,
                    marks=marks,
                    smooth=False,
                )
                note = "Dashed upright: the best checkpoint." if marks else ""
                figures.append(Figure(title, picture, note, legend_of(groups, metrics)))

    return figures


def _charts(runs: Sequence[RunRecord]) -> Mapping[str, Mapping[str, Mapping[str, str]]]:
    """Returns the charts of every name: titles, and the metrics in them with their labels."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for evaluation in (one for run in runs for one in run.evaluations):
        if evaluation.name == HELD_OUT:
            found[HELD_OUT] = {title: dict(metrics) for title, metrics in _HELD_OUT.items()}
            continue

        own = found.setdefault(evaluation.name, {})
        largest = f"{_PASS_AT}{evaluation.samples}"
        for metric in evaluation.measurements:
            if metric.startswith(_PASS_AT) and metric != largest:
                continue

            title = next((BENCHMARK[start] for start in BENCHMARK if metric.startswith(start)), "")
            if title:
                own.setdefault(f"{evaluation.name}: {title}", {})[metric] = _label(metric)

    return found


def _label(metric: str) -> str:
    return metric.replace("_at_", "@").replace("_", " ")


def _line(name: str, is_share: bool, group: Group, metric: str) -> Line:
    """Returns a metric of a group: of one run with its 95 % interval, of several their mean with a
    band from the lowest to the highest.
    """
    line = group.line(partial(_edge, name, metric, is_share, 0))
    if len(group.runs) > 1:
        return line

    low, high = (group.line(partial(_edge, name, metric, is_share, sign)) for sign in (-1, 1))
    return replace(line, lows=low.ys, highs=high.ys)


def _edge(
    name: str, metric: str, is_share: bool, sign: int, run: RunRecord
) -> Mapping[int, float | None]:
    """Returns an edge of the 95 % interval by step, which is the mean itself where no error is known,
    or where ``sign`` is 0. That of a share is no lower than 0 and no higher than 1.
    """
    edges: dict[int, float | None] = {}
    for evaluation in run.measured(name):
        one = evaluation.measurements.get(metric)
        edge = None if one is None else one.mean + sign * (one.half_width or 0.0)
        edges[evaluation.step] = edge if edge is None or not is_share else min(max(edge, 0.0), 1.0)

    return edges


def _best(runs: Sequence[RunRecord], name: str, metrics: Mapping[str, str]) -> list[Mark]:
    """Returns the mark of the best checkpoint, in the chart of what it is the best by."""
    named = {f"{name}/{metric}" for metric in metrics}
    best = runs[0].summary.best if len(runs) == 1 else None
    return [Mark(best.step, "best")] if best and best.metric in named else []


def histograms(runs: Sequence[RunRecord]) -> list[Figure]:
    """Draws the entropy of teacher and student before and after, of each run, on the same axes."""
    shown = [(run, _shares(run)) for run in runs if run.held_out]
    points: list[tuple[float, float]] = []
    for _, lines in shown:
        for line in lines:
            points += line.points()

    return [_histogram(run, lines, points) for run, lines in shown]


def _shares(run: RunRecord) -> list[Line]:
    """Returns the share of tokens in each bin, of teacher and student in every phase."""
    lines = []
    for phase, record in run.held_out.items():
        for color, model in enumerate(("teacher", "student")):
            counts = record[f"{model}_entropy_counts"]
            edges = [round(i * record["entropy_bin_nats"], 6) for i in range(len(counts))]
            shares = [count / max(sum(counts), 1) for count in counts]
            dash = int(phase == "before")
            lines.append(Line(f"{model}, {phase}", edges, shares, color=color, dash=dash))

    return lines


def _histogram(run: RunRecord, lines: Sequence[Line], axis_points: Points) -> Figure:
    records = list(run.held_out.values())
    width = records[0]["entropy_bin_nats"]
    tau = run.config.get("loss.gate.tau")
    # the first edge of a bin that is no lower: what a bin holds below it cannot be told apart
    edge = math.ceil((tau if isinstance(tau, int | float) else PAPER_TAU) / width - 1e-9) * width
    shares = []
    for line in lines:
        share = sum(y for x, y in line.points() if x >= edge - 1e-6)
        shares.append(f"{line.label} {share:.1%}")

    counted = [
        f"{sum(one['teacher_entropy_counts']):,} {phase}" for phase, one in run.held_out.items()
    ]
    note = f"Tokens above {edge:.3g} nats: {'; '.join(shares)}. Tokens: {', '.join(counted)}."
    picture = charts.histogram(
        f"{run.name}: entropy",
        lines,
        width,
        run.threshold,
        axis_points,
    )
    return Figure(run.name, picture, note, {line.classes: line.label for line in lines})
