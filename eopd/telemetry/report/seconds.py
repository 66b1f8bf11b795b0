"""Shows where the time of a run goes: a usual step with who worked and who waited, the seconds of
a step over the run, and what of the wall time was no step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from markupsafe import Markup

from eopd.config.benchmark import HELD_OUT
from eopd.telemetry import step
from eopd.telemetry.report import charts
from eopd.telemetry.report.figure import Figure
from eopd.telemetry.report.lines import Line, Points, smoothed, thinned
from eopd.telemetry.report.reading import Record, RunRecord
from eopd.types import Span

# How a step's seconds are split, in their order, with the classes of their colours.
PARTS: Final[Mapping[str, tuple[str, str]]] = {
    f"eopd_{part}_seconds": (activity, f"f-{part.replace('_', '-')}")
    for part, activity in step.PARTS.items()
}
WAITS: Final = ("eopd_wait_rollout_seconds", "eopd_wait_teacher_seconds")
STAGES: Final[Mapping[str, str]] = {
    "engines write": "f-rollout",
    "teachers read": "f-teacher",
    **{f"learner {activity}": name for activity, name in PARTS.values()},
}
MOST_STRETCHED: Final = 3.0  # a step that is shorter by more has an axis of its own


@dataclass(frozen=True, slots=True)
class Lane:
    """A row of a timeline: ``spans`` of (from, to, class, activity), in seconds; None where they
    were not recorded.
    """

    label: str
    spans: Sequence[tuple[float, float, str, str]] | None


def accounts(runs: Sequence[RunRecord]) -> list[str]:
    """Returns how the wall time of each run is made up."""
    return [_account(run) for run in runs]


def _account(run: RunRecord) -> str:
    last, checkpoints = run.rows[-1]["step"], run.checkpoints()
    # benchmarks are measured beside the next step, the held-out prompts between two
    between_them = [one.seconds for one in run.measured(HELD_OUT) if one.phase == "during"]
    at_the_ends = [one.seconds for one in run.evaluations if one.phase != "during"]
    known = sum(between_them) + sum(spent for at, spent in checkpoints.items() if at < last)
    between = sum(row.get("eopd_between_steps_seconds") or 0.0 for row in run.rows)
    seconds = {
        "steps": sum(row["eopd_step_seconds"] for row in run.rows),
        "evaluations": sum(at_the_ends) + sum(between_them),
        "checkpoints": sum(checkpoints.values()),
        "other time between steps": max(0.0, between - known),
    }
    rest = run.wall_s - sum(seconds.values())
    parts = [f"{name} {spent:,.0f} s" for name, spent in seconds.items() if spent >= 0.5]
    if rest >= 0.5:
        parts.append(f"start-up and everything else {rest:,.0f} s")

    return f"{run.name}: {run.wall_s:,.0f} s in all: {', '.join(parts)}."


def splits(runs: Sequence[RunRecord]) -> list[Figure]:
    """Draws the seconds of a step over each run, on the same axes."""
    splits = [_seconds(run) for run in runs]
    axis_points: list[tuple[float, float]] = []
    for lines in filter(None, splits):
        axis_points += charts.totals(list(lines.values()))

    return [_split(run, lines, axis_points) for run, lines in zip(runs, splits, strict=True)]


def _seconds(run: RunRecord) -> dict[str, Line]:
    """Returns the parts of a step that a run has recorded, at the steps that have all of them."""
    recorded = [name for name in PARTS if set(run.column(name)) - {None}]
    rows = [row for row in run.rows if None not in map(row.get, recorded)]
    if not rows:
        return {}

    steps = [row["step"] for row in rows]
    lines = {}
    for name in recorded:
        line = Line(PARTS[name][0], steps, [row[name] for row in rows])
        lines[name] = smoothed(thinned(line, 200))

    return lines


def _split(run: RunRecord, lines: Mapping[str, Line], axis_points: Points) -> Figure:
    title = f"{run.name}: seconds of a step"
    missing = [label for name, (label, _) in PARTS.items() if name not in lines]
    note = f"Not recorded: {', '.join(missing)}." if missing else ""
    picture = Markup("")
    if lines:
        classes = [PARTS[name][1] for name in lines]
        picture = charts.stacked(title, list(lines.values()), classes, axis_points)

    return Figure(title, picture, note)


def timelines(runs: Sequence[RunRecord]) -> list[Figure]:
    """Draws who worked and who waited in a median step of each run, on the same axis unless a
    step is too short for that.
    """
    rows = [_median_step(run) for run in runs]
    longest = max(row["eopd_step_seconds"] for row in rows)
    figures = []

    for run, row in zip(runs, rows, strict=True):
        is_short = row["eopd_step_seconds"] * MOST_STRETCHED < longest
        axis = row["eopd_step_seconds"] if is_short else longest
        note = "On an axis of its own, since this step is much shorter." if is_short else ""
        figures.append(_timeline(run, row, axis, note))

    return figures


def _median_step(run: RunRecord) -> Record:
    """Returns the step of median length in the later half, when everything is warm, of those that
    have a timeline.
    """
    late = run.rows[len(run.rows) // 2 :]
    recorded = [row for row in run.rows if row["step"] in run.timeline]
    recorded_late = [row for row in late if row["step"] in run.timeline]
    rows = recorded_late or recorded or late

    return sorted(rows, key=lambda row: float(row["eopd_step_seconds"]))[len(rows) // 2]


def _timeline(run: RunRecord, row: Record, axis: float, note: str) -> Figure:
    """Draws a step on an axis of so many seconds."""
    seconds = row["eopd_step_seconds"]
    lanes = []

    for stage, workers, activity, name in (
        ("generate", "Rollout engines", "some write", "f-rollout"),
        ("score", "Teachers", "some read", "f-teacher"),
    ):
        spans = run.timeline.get(row["step"], {}).get(stage)
        if spans is None:
            lanes.append(Lane(f"{workers}: not recorded", None))
            continue

        # what began before the step, between it and the one before, is drawn from the step's start
        busy = [(max(a, 0.0), b) for a, b in spans if b > 0.0]
        label = f"{workers}, busy {sum(b - a for a, b in busy) / seconds:.0%}"
        lanes.append(Lane(label, [(a, b, name, activity) for a, b in busy]))

    lanes.append(_learner(row, run.timeline.get(row["step"], {})))
    title = f"{run.name}: step {row['step']}, {seconds:.2f} s"

    return Figure(title, timeline(title, lanes, axis), note)


def _learner(row: Record, recorded_spans: Mapping[str, Sequence[Span]]) -> Lane:
    """Returns the learner's lane: the parts of its step when they were, or one after the other where
    a run has not recorded that, up to the step's end where its waits were not recorded.
    """
    recorded = {name: row[name] for name in PARTS if row.get(name) is not None}
    whole = row["eopd_step_seconds"]
    start = 0.0 if len(recorded) == len(PARTS) else max(0.0, whole - sum(recorded.values()))
    spans = []

    for name, seconds in recorded.items():
        activity, classes = PARTS[name]
        stage = name.removeprefix("eopd_").removesuffix("_seconds")
        for begin, end in recorded_spans.get(stage, [(start, start + seconds)]):
            spans.append((begin, end, classes, activity))

        start += seconds

    if recorded.keys() >= set(WAITS):
        share = sum(recorded[name] for name in WAITS) / whole
        return Lane(f"Learner, waits {share:.0%}", spans)

    return Lane("Learner: waits not recorded", spans)


def timeline(title: str, lanes: Sequence[Lane], seconds: float) -> Markup:
    """Draws who was at work when, from 0 to ``seconds``. Positions are shares of the width, so
    that text keeps its size.
    """
    row = 46
    height = row * len(lanes) + 24
    parts = []

    for index, lane in enumerate(lanes):
        y = index * row
        parts.append(Markup('<text x="0" y="{}" class="lane">{}</text>').format(y + 14, lane.label))
        if lane.spans is not None:
            parts.append(
                Markup('<rect x="0" width="100%" y="{}" height="18" class="idle"/>').format(y + 20)
            )

        for start, stop, name, activity in lane.spans or ():
            shape = Markup(
                '<rect x="{:.3f}%" width="{:.3f}%" y="{}" height="18" class="{}">'
                "<title>{}</title></rect>"
            )
            share, width = 100 * start / seconds, 100 * (stop - start) / seconds
            parts.append(
                shape.format(
                    share,
                    width,
                    y + 20,
                    name,
                    f"{activity}: {start:.2f} to {stop:.2f} s",
                )
            )

    for tick in charts.ticks(0.0, seconds, 4):
        share = 100 * tick / seconds
        anchor = "start" if share < 5 else "end" if share > 95 else "middle"
        parts.append(
            Markup('<text x="{:.2f}%" y="{}" text-anchor="{}">{:g} s</text>').format(
                share, height - 4, anchor, tick
            )
        )

    opening = Markup('<svg class="timeline" width="100%" height="{}" role="img" aria-label="{}">')

    return opening.format(height, title) + Markup("").join(parts) + Markup("</svg>")
