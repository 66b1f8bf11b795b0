"""Makes one HTML file of runs: what goes where on the page. Its text, style and script are the
files beside this one.
"""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import jinja2
from markupsafe import Markup

from eopd.config import ConfigError
from eopd.telemetry.report import charts
from eopd.telemetry.report.charts import Lane, Line, look
from eopd.telemetry.report.reading import (
    Record,
    RunRecord,
    comparison,
    headline,
    measured_differently,
    read_runs,
)
from eopd.telemetry.report.samples import ENTROPY_EDGES, KL_EDGES, count_prompts, prompts_of
from eopd.telemetry.series import parse_series

logger = logging.getLogger(__name__)

POINTS = 1200  # of one metric over all runs

# One chart each: its title, and the metrics in it with what the legend calls them.
CURVES: Final[Sequence[tuple[str, Mapping[str, str]]]] = (
    ("Reverse KL (nats)", {"eopd_reverse_kl_nats": "reverse KL"}),
    (
        "Forward KL (nats)",
        {"eopd_forward_kl_gated_nats": "gate open", "eopd_forward_kl_ungated_nats": "gate shut"},
    ),
    (
        "Entropy (nats)",
        {"eopd_teacher_entropy_nats": "teacher", "eopd_student_entropy_nats": "student"},
    ),
    ("Gate open (share of tokens)", {"eopd_gate_ratio": "gate"}),
    (
        "Mass on the teacher's top k",
        {"eopd_teacher_topk_mass_ratio": "teacher", "eopd_student_topk_mass_ratio": "student"},
    ),
    ("Response length (tokens)", {"eopd_response_tokens_mean": "length"}),
    ("Ended by itself (share)", {"eopd_end_token_ratio": "ended"}),
    ("Staleness (versions)", {"eopd_staleness_mean": "mean", "eopd_staleness_max": "oldest token"}),
    ("Top k in common (share)", {"eopd_topk_overlap_ratio": "overlap"}),
    ("Engine against learner (nats)", {"eopd_logprob_gap_nats": "|log p - log b|"}),
    ("Gradient norm", {"eopd_grad_norm": "norm"}),
    ("Response tokens per second", {"eopd_response_tokens_per_second": "rate"}),
)
# The same, drawn only where the rows have them.
MORE_CURVES: Final[Sequence[tuple[str, Mapping[str, str]]]] = (
    ("Loss (nats)", {"eopd_loss": "loss"}),
    (
        "Clipped and capped (share of tokens)",
        {"eopd_clipped_ratio": "ratio clipped", "eopd_importance_capped_ratio": "weight capped"},
    ),
    ("Written before (share of runs of four tokens)", {"eopd_repetition_ratio": "repetition"}),
    ("Reward", {"eopd_reward_mean": "reward"}),
    ("Checkpoint (seconds)", {"eopd_checkpoint_seconds": "newest"}),
)
# How a step's seconds are split, in their order, with the classes of their colours.
WAITS: Final[Mapping[str, tuple[str, str]]] = {
    "eopd_wait_rollout_seconds": ("waits for engines", "f-wait-rollout"),
    "eopd_wait_teacher_seconds": ("waits for teachers", "f-wait-teacher"),
}
PARTS: Final[Mapping[str, tuple[str, str]]] = {
    **WAITS,
    "eopd_train_seconds": ("trains", "f-train"),
    "eopd_weights_seconds": ("sends weights", "f-weights"),
}
PAPER_TAU: Final = 0.8  # nats
_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader(__name__, ""),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
)


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart with its caption. ``legend`` names what its colours and dashes mean, by class."""

    title: str
    picture: Markup
    note: str
    legend: Mapping[str, str]


def write_report(directories: Sequence[Path], output: Path) -> None:
    """Write the report of one run, or of several side by side.

    Raises:
        ConfigError: one is no run directory, or no step was completed in it.
        OSError: ``output`` cannot be written.
    """
    output.write_text(render(read_runs(directories)), encoding="utf-8")


def report_of_ended(directory: Path, output: Path) -> None:
    """Write the report of a run that has ended. A report that fails is logged, and changes nothing
    of how the run ended.
    """
    try:
        write_report([directory], output)
    except ConfigError as nothing_to_show:
        logger.info("no report: %s", nothing_to_show)
    except Exception:
        logger.warning("%s could not be written", output, exc_info=True)


def render(runs: Sequence[RunRecord]) -> str:
    """Returns the whole page."""
    return _ENVIRONMENT.get_template("page.html").render(
        made=time.strftime("%Y-%m-%d %H:%M"),
        runs=runs,
        look=look,
        headlines=[headline(run) for run in runs],
        comparison=comparison(runs),
        differently=measured_differently(runs),
        prompts=prompts_of(runs),
        num_prompts=count_prompts(runs),
        thresholds=sorted({run.threshold for run in runs if run.threshold is not None}),
        entropy_edges=ENTROPY_EDGES,
        kl_edges=KL_EDGES,
        changed=any(run.changes for run in runs),
        curves=[_curves(title, metrics, runs) for title, metrics in [*CURVES, *_more(runs)]],
        histograms=_histograms(runs),
        splits=_splits(runs),
        timelines=_timelines(runs),
        stages={"engines write": "f-rollout", "teachers read": "f-teacher"}
        | {f"learner {activity}": name for activity, name in PARTS.values()},
        settings=_table([run.config for run in runs]),
        versions=_table([run.versions for run in runs]),
    )


def _more(runs: Sequence[RunRecord]) -> list[tuple[str, Mapping[str, str]]]:
    """Returns those of ``MORE_CURVES`` that some row has, and the trajectories that were lost, by
    reason.
    """
    rows = [row for run in runs for row in run.rows]
    recorded = {name for row in rows for name, value in row.items() if value is not None}
    positive = {name for row in rows for name, value in row.items() if value}
    lost = {
        name: parse_series(name)[1]["reason"]
        for name in sorted(positive)
        if name.startswith("eopd_lost_trajectories_total")
    }
    curves = []
    for title, metrics in MORE_CURVES:
        curves.append((title, {name: metrics[name] for name in metrics if name in recorded}))

    return [
        (title, metrics) for title, metrics in [*curves, ("Lost trajectories", lost)] if metrics
    ]


def _curves(title: str, metrics: Mapping[str, str], runs: Sequence[RunRecord]) -> Figure:
    """Draws a chart of metrics. Colours tell runs apart, or metrics where there is one run; dashes
    tell metrics apart.
    """
    many = len(runs) > 1
    lines = [
        Line(
            label=f"{run.name}, {label}" if many else label,
            xs=run.steps,
            ys=run.column(name),
            color=color if many else dash,
            dash=dash,
        )
        for color, run in enumerate(runs)
        for dash, (name, label) in enumerate(metrics.items())
    ]
    catalogued = [parse_series(name)[0] for name in metrics]
    percent = all(metric.unit == "ratio" for metric in catalogued)
    legend = {
        f"c{'n' if many else dash} d{dash}": label for dash, label in enumerate(metrics.values())
    }
    note = " ".join(dict.fromkeys(metric.healthy for metric in catalogued))
    num_points = min(max(POINTS // len(runs), 40), 300)
    marks = sorted({change["from_step"] for run in runs for change in run.changes})
    picture = charts.curves(title, lines, percent=percent, num_points=num_points, marks=marks)

    return Figure(title, picture, note, legend if len(metrics) > 1 else {})


def _histograms(runs: Sequence[RunRecord]) -> list[Figure]:
    """Draws the entropy of teacher and student, of each run and phase, on the same axes."""
    records = [
        (run, phase, record, _shares(record))
        for run in runs
        for phase, record in run.held_out.items()
    ]
    points = [point for *_, lines in records for line in lines for point in line.points()]
    return [_histogram(run, phase, record, lines, points) for run, phase, record, lines in records]


def _shares(record: Record) -> list[Line]:
    """Returns the share of tokens in each bin, of teacher and student."""
    lines = []
    for index, model in enumerate(("teacher", "student")):
        counts = record[f"{model}_entropy_counts"]
        edges = [round(i * record["entropy_bin_nats"], 6) for i in range(len(counts))]
        shares = [count / max(sum(counts), 1) for count in counts]
        lines.append(Line(model, edges, shares, color=index, dash=index))

    return lines


def _histogram(
    run: RunRecord, phase: str, record: Record, lines: Sequence[Line], axis_points: charts.Points
) -> Figure:
    width = record["entropy_bin_nats"]
    tau = run.config.get("loss.gate.tau")
    # the first edge of a bin that is no lower: what a bin holds below it cannot be told apart
    edge = math.ceil((tau if isinstance(tau, int | float) else PAPER_TAU) / width - 1e-9) * width
    shares = []
    for line in lines:
        share = sum(y for x, y in line.points() if x >= edge - 1e-6)
        shares.append(f"{line.label} {share:.1%}")

    title = f"{run.name}: {phase} training (step {record['step']})"
    note = (
        f"Tokens above {edge:.3g} nats: {', '.join(shares)}. "
        f"{sum(record['teacher_entropy_counts']):,} tokens."
    )
    picture = charts.histogram(title, lines, width, run.threshold, axis_points)

    return Figure(title, picture, note, {"c0 d0": "teacher", "c1 d1": "student"})


def _splits(runs: Sequence[RunRecord]) -> list[Figure]:
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
        lines[name] = charts.smoothed(charts.thinned(line, 200))

    return lines


def _split(run: RunRecord, lines: Mapping[str, Line], axis_points: charts.Points) -> Figure:
    title = f"{run.name}: seconds of a step"
    missing = [label for name, (label, _) in PARTS.items() if name not in lines]
    note = f"Not recorded: {', '.join(missing)}." if missing else ""
    picture = Markup("")
    if lines:
        classes = [PARTS[name][1] for name in lines]
        picture = charts.stacked(title, list(lines.values()), classes, axis_points)

    return Figure(title, picture, note, {})


def _timelines(runs: Sequence[RunRecord]) -> list[Figure]:
    """Draws who worked and who waited in a median step of each run."""
    rows = [_median_step(run) for run in runs]
    seconds = max(row["eopd_step_seconds"] for row in rows)
    return [_timeline(run, row, seconds) for run, row in zip(runs, rows, strict=True)]


def _median_step(run: RunRecord) -> Record:
    """Returns the step of median length in the later half, when everything is warm, of those that
    have a timeline.
    """
    late = run.rows[len(run.rows) // 2 :]
    recorded = [row for row in run.rows if row["step"] in run.timeline]
    recorded_late = [row for row in late if row["step"] in run.timeline]
    rows = recorded_late or recorded or late

    return sorted(rows, key=lambda row: float(row["eopd_step_seconds"]))[len(rows) // 2]


def _timeline(run: RunRecord, row: Record, longest: float) -> Figure:
    """Draws a step on an axis of ``longest`` seconds."""
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

    lanes.append(_learner(row))
    title = f"{run.name}: step {row['step']}, {seconds:.2f} s"

    return Figure(title, charts.timeline(title, lanes, longest), "", {})


def _learner(row: Record) -> Lane:
    """Returns the learner's lane: the parts of its step in their order, up to the step's end where
    its waits were not recorded.
    """
    recorded = {name: row[name] for name in PARTS if row.get(name) is not None}
    step = row["eopd_step_seconds"]
    start = 0.0 if len(recorded) == len(PARTS) else max(0.0, step - sum(recorded.values()))
    spans = []

    for name, seconds in recorded.items():
        activity, classes = PARTS[name]
        spans.append((start, start + seconds, classes, activity))
        start += seconds

    if WAITS.keys() <= recorded.keys():
        share = sum(recorded[name] for name in WAITS) / step
        return Lane(f"Learner, waits {share:.0%}", spans)

    return Lane("Learner: waits not recorded", spans)


def _table(columns: Sequence[Mapping[str, object]]) -> list[tuple[str, list[str], bool]]:
    """Returns (key, its value in each column, whether they differ), those that differ first."""
    keys = dict.fromkeys(key for column in columns for key in column)
    rows = []
    for key in keys:
        values = [str(column.get(key, "-")) for column in columns]
        rows.append((key, values, len(set(values)) > 1))
    return sorted(rows, key=lambda row: not row[2])
