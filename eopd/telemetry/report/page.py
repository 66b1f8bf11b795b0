"""Runs to one HTML file: what goes where on the page. Its text, style and script are the
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
# How a step's seconds are split, in their order, with the class of its colour.
PARTS: Final[Mapping[str, tuple[str, str]]] = {
    "wait_rollout": ("waits for engines", "f-wait-rollout"),
    "wait_teacher": ("waits for teachers", "f-wait-teacher"),
    "train": ("trains", "f-train"),
    "weights": ("sends weights", "f-weights"),
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
    chart: Markup
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
    """The report of a run that has ended as it has: a report that fails changes nothing, and
    is logged.
    """
    try:
        write_report([directory], output)
    except ConfigError as nothing_to_show:
        logger.info("no report: %s", nothing_to_show)
    except Exception:
        logger.warning("%s could not be written", output, exc_info=True)


def render(runs: Sequence[RunRecord]) -> str:
    """The whole page."""
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
        | {f"learner {does}": name for does, name in PARTS.values()},
        settings=_table([run.config for run in runs]),
        versions=_table([run.versions for run in runs]),
    )


def _more(runs: Sequence[RunRecord]) -> list[tuple[str, Mapping[str, str]]]:
    """Those of ``MORE_CURVES`` that some row has, and by their reasons the trajectories that
    were lost, if any.
    """
    highest: dict[str, float] = {}
    for name, value in (
        (name, value) for run in runs for row in run.rows for name, value in row.items()
    ):
        if value is not None:
            highest[name] = max(value, highest.get(name, value))

    lost = {
        name: parse_series(name)[1]["reason"]
        for name, value in sorted(highest.items())
        if name.startswith("eopd_lost_trajectories_total") and value > 0
    }
    pictures = []
    for title, metrics in MORE_CURVES:
        pictures.append((title, {name: metrics[name] for name in metrics if name in highest}))
    pictures.append(("Lost trajectories", lost))

    return [(title, metrics) for title, metrics in pictures if metrics]


def _curves(title: str, metrics: Mapping[str, str], runs: Sequence[RunRecord]) -> Figure:
    """Colours tell runs apart, or metrics where there is one run; dashes tell metrics apart."""
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
    known = [parse_series(name)[0] for name in metrics]
    percent = all(metric.unit == "ratio" for metric in known)
    legend = {
        f"c{'n' if many else dash} d{dash}": label for dash, label in enumerate(metrics.values())
    }
    note = " ".join(dict.fromkeys(metric.healthy for metric in known))
    num_points = min(max(POINTS // len(runs), 40), 300)
    marks = sorted({change["from_step"] for run in runs for change in run.changes})
    picture = charts.curves(title, lines, percent=percent, num_points=num_points, marks=marks)

    return Figure(title, picture, note, legend if len(metrics) > 1 else {})


def _histograms(runs: Sequence[RunRecord]) -> list[Figure]:
    """Entropy of teacher and student, of each run and phase."""
    records = [
        (run, phase, record, _shares(record))
        for run in runs
        for phase, record in run.held_out.items()
    ]
    reach = [point for *_, lines in records for line in lines for point in line.points()]
    return [_histogram(run, phase, record, lines, reach) for run, phase, record, lines in records]


def _shares(record: Record) -> list[Line]:
    lines = []
    for index, who in enumerate(("teacher", "student")):
        counts = record[f"{who}_entropy_counts"]
        edges = [round(i * record["entropy_bin_nats"], 6) for i in range(len(counts))]
        lines.append(
            Line(who, edges, [count / max(sum(counts), 1) for count in counts], index, index)
        )

    return lines


def _histogram(
    run: RunRecord, phase: str, record: Record, lines: Sequence[Line], reach: charts.Points
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
    picture = charts.histogram(title, lines, width, run.threshold, reach)

    return Figure(title, picture, note, {"c0 d0": "teacher", "c1 d1": "student"})


def _splits(runs: Sequence[RunRecord]) -> list[Figure]:
    """The seconds of a step over each run."""
    parts = [_seconds(run) for run in runs]
    reach = [point for of_run in parts if of_run for point in charts.totals(list(of_run.values()))]
    return [_split(run, of_run, reach) for run, of_run in zip(runs, parts, strict=True)]


def _seconds(run: RunRecord) -> dict[str, Line]:
    """The parts of a step that a run has recorded, at the steps that have all of them."""
    names = {part: f"eopd_{part}_seconds" for part in PARTS}
    recorded = {part: name for part, name in names.items() if set(run.column(name)) - {None}}
    rows = [row for row in run.rows if None not in map(row.get, recorded.values())]
    if not rows:
        return {}

    steps = [row["step"] for row in rows]
    lines = {}
    for part, name in recorded.items():
        line = Line(PARTS[part][0], steps, [row[name] for row in rows])
        lines[part] = charts.smoothed(charts.thinned(line, 200))

    return lines


def _split(run: RunRecord, parts: Mapping[str, Line], reach: charts.Points) -> Figure:
    title = f"{run.name}: seconds of a step"
    missing = [label for part, (label, _) in PARTS.items() if part not in parts]
    note = f"Not recorded: {', '.join(missing)}." if missing else ""
    classes = [PARTS[part][1] for part in parts]
    picture = charts.stacked(title, list(parts.values()), classes, reach) if parts else Markup("")
    return Figure(title, picture, note, {})


def _timelines(runs: Sequence[RunRecord]) -> list[Figure]:
    """Who worked and who waited in a usual step of each run."""
    rows = [_usual(run) for run in runs]
    seconds = max(row["eopd_step_seconds"] for row in rows)
    return [_timeline(run, row, seconds) for run, row in zip(runs, rows, strict=True)]


def _usual(run: RunRecord) -> Record:
    """The step of median length among the later half, once everything is warm, of those that
    have a timeline.
    """
    later = run.rows[len(run.rows) // 2 :]
    known = [row for row in run.rows if row["step"] in run.timeline]
    known_later = [row for row in later if row["step"] in run.timeline]
    rows = sorted(known_later or known or later, key=lambda row: float(row["eopd_step_seconds"]))
    return rows[len(rows) // 2]


def _timeline(run: RunRecord, row: Record, longest: float) -> Figure:
    """One step, on an axis of ``longest`` seconds."""
    seconds = row["eopd_step_seconds"]
    lanes = []

    for stage, who, does, name in (
        ("generate", "Rollout engines", "some write", "f-rollout"),
        ("score", "Teachers", "some read", "f-teacher"),
    ):
        spans = run.timeline.get(row["step"], {}).get(stage)
        if spans is None:
            lanes.append(Lane(f"{who}: not recorded", None))
            continue

        # what began before the step, between it and the one before, is drawn from the step's start
        busy = [(max(a, 0.0), b) for a, b in spans if b > 0.0]
        label = f"{who}, busy {sum(b - a for a, b in busy) / seconds:.0%}"
        lanes.append(Lane(label, [(a, b, name, does) for a, b in busy]))

    lanes.append(_learner(row))
    title = f"{run.name}: step {row['step']}, {seconds:.2f} s"

    return Figure(title, charts.timeline(title, lanes, longest), "", {})


def _learner(row: Record) -> Lane:
    """What the learner did, one after the other; where its waits were not recorded, the rest
    up to the step's end.
    """
    took = {part: row.get(f"eopd_{part}_seconds") for part in PARTS}
    known = {part: seconds for part, seconds in took.items() if seconds is not None}
    step = row["eopd_step_seconds"]
    start = 0.0 if len(known) == len(took) else max(0.0, step - sum(known.values()))
    spans = []

    for part, seconds in known.items():
        label, name = PARTS[part]
        spans.append((start, start + seconds, name, label))
        start += seconds

    waits = [known[part] for part in ("wait_rollout", "wait_teacher") if part in known]
    label = (
        f"Learner, waits {sum(waits) / step:.0%}"
        if len(waits) == 2
        else "Learner: waits not recorded"
    )

    return Lane(label, spans)


def _table(columns: Sequence[Mapping[str, object]]) -> list[tuple[str, list[str], bool]]:
    """(key, its value in each column, whether they differ), those that differ first."""
    keys = dict.fromkeys(key for column in columns for key in column)
    rows = []
    for key in keys:
        values = [str(column.get(key, "-")) for column in columns]
        rows.append((key, values, len(set(values)) > 1))
    return sorted(rows, key=lambda row: not row[2])
