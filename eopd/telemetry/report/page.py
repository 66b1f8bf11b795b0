"""Runs to one HTML file: what goes where on the page. Its text, style and script are the files beside this one."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import jinja2
from markupsafe import Markup

from eopd.config import ConfigError
from eopd.telemetry.catalog import CATALOG
from eopd.telemetry.report import charts
from eopd.telemetry.report.charts import MARKS, Lane, Line
from eopd.telemetry.report.reading import Record, RunRecord, read_runs
from eopd.telemetry.report.samples import ENTROPY_EDGES, KL_EDGES, prompts_of

logger = logging.getLogger(__name__)

POINTS = 1200  # of one metric over all runs

# One chart each: its title, and the metrics in it with what the legend calls them.
CURVES: Final[Sequence[tuple[str, Mapping[str, str]]]] = (
    ("Reverse KL (nats)", {"eopd_reverse_kl_nats": "reverse KL"}),
    (
        "Forward KL (nats)",
        {"eopd_forward_kl_gated_nats": "gate open", "eopd_forward_kl_ungated_nats": "gate shut"},
    ),
    ("Entropy (nats)", {"eopd_teacher_entropy_nats": "teacher", "eopd_student_entropy_nats": "student"}),
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
# How a step's seconds are split, in their order, with the class of its colour.
PARTS: Final[Mapping[str, tuple[str, str]]] = {
    "wait_rollout": ("waits for engines", "f-wait-rollout"),
    "wait_teacher": ("waits for teachers", "f-wait-teacher"),
    "train": ("trains", "f-train"),
    "weights": ("sends weights", "f-weights"),
}
HELD_OUT: Final[Mapping[str, tuple[str, str]]] = {
    "reverse_kl": ("reverse KL", "nats"),
    "forward_kl": ("forward KL", "nats"),
    "top1_agreement": ("top-1 agreement", "ratio"),
    "student_entropy": ("student entropy", "nats"),
    "teacher_entropy": ("teacher entropy", "nats"),
}
_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader(__name__, ""), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
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
    """The report of a run that has ended as it has: a report that fails changes nothing, and is logged."""
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
        marks=MARKS,
        headlines=[_headline(run) for run in runs],
        prompts=prompts_of(runs),
        thresholds=sorted({run.threshold for run in runs if run.threshold is not None}),
        entropy_edges=ENTROPY_EDGES,
        kl_edges=KL_EDGES,
        curves=[_curves(title, metrics, runs) for title, metrics in CURVES],
        histograms=[_histogram(run, phase, record) for run in runs for phase, record in run.held_out.items()],
        splits=[_split(run) for run in runs],
        timelines=[_timeline(run) for run in runs],
        stages={"engines write": "f-rollout", "teachers read": "f-teacher"}
        | {f"learner {does}": name for does, name in PARTS.values()},
        settings=_table([run.config for run in runs]),
        versions=_table([run.versions for run in runs]),
    )


def _headline(run: RunRecord) -> Mapping[str, object]:
    """What a person wants to know first."""
    last = run.rows[-1]
    seconds = sum(row["eopd_step_seconds"] for row in run.rows)
    tokens = last["eopd_response_tokens_total"]
    held_out = run.summary.get("held_out", {})
    return {
        "name": run.name,
        "status": run.summary.get("status", "unknown"),
        "notes": run.notes,
        "facts": {
            "steps": f"{last['step']} of {run.config.get('run.batches', '?')}",
            "response tokens": f"{tokens:,.0f}",
            "tokens per second": f"{tokens / seconds:.1f}",
            "wall time": _clock(run.summary.get("wall_s", seconds)),
            "last step": time.strftime("%Y-%m-%d %H:%M", time.localtime(last["time"])),
        },
        "held_out": [
            _change(label, unit, (held_out.get("before") or {}).get(name), (held_out.get("after") or {}).get(name))
            for name, (label, unit) in HELD_OUT.items()
        ],
    }


def _change(label: str, unit: str, before: Record | None, after: Record | None) -> Mapping[str, str]:
    difference = "" if before is None or after is None else f"{after['mean'] - before['mean']:+.3f}"
    return {"label": label, "unit": unit, "before": _measured(before), "after": _measured(after), "change": difference}


def _measured(found: Record | None) -> str:
    if found is None:
        return "-"
    error = found["standard_error"]
    return f"{found['mean']:.3f}" + ("" if error is None else f" ± {error:.3f}")


def _curves(title: str, metrics: Mapping[str, str], runs: Sequence[RunRecord]) -> Figure:
    """Colours tell runs apart, or metrics where there is one run; dashes tell metrics apart."""
    room = max(POINTS // len(runs), 40)
    many = len(runs) > 1
    lines = [
        charts.thinned(
            Line(
                label=f"{run.name}, {label}" if many else label,
                xs=run.steps,
                ys=run.column(name),
                color=color if many else dash,
                dash=dash,
            ),
            min(room, 300),
        )
        for color, run in enumerate(runs)
        for dash, (name, label) in enumerate(metrics.items())
    ]
    percent = all(CATALOG[name].unit == "ratio" for name in metrics)
    legend = {f"c{'n' if many else dash} d{dash}": label for dash, label in enumerate(metrics.values())}
    note = " ".join(dict.fromkeys(CATALOG[name].healthy for name in metrics))
    return Figure(title, charts.curves(title, lines, percent=percent), note, legend if len(metrics) > 1 else {})


def _histogram(run: RunRecord, phase: str, record: Record) -> Figure:
    width = record["entropy_bin_nats"]
    lines, shares = [], []
    for index, who in enumerate(("teacher", "student")):
        counts = record[f"{who}_entropy_counts"]
        total = max(sum(counts), 1)
        edges = [round(i * width, 6) for i in range(len(counts))]
        lines.append(Line(who, edges, [count / total for count in counts], index, index))
        above = sum(count for edge, count in zip(edges, counts, strict=True) if edge >= 0.8 - 1e-9)
        shares.append(f"{who} {above / total:.1%}")
    title = f"{run.name}: {phase} training (step {record['step']})"
    note = f"Tokens above 0.8 nats: {', '.join(shares)}. {sum(record['teacher_entropy_counts']):,} tokens."
    picture = charts.histogram(title, lines, width, run.threshold)
    return Figure(title, picture, note, {"c0 d0": "teacher", "c1 d1": "student"})


def _split(run: RunRecord) -> Figure:
    lines = [
        Line(label, run.steps, [row.get(f"eopd_{part}_seconds") or 0.0 for row in run.rows])
        for part, (label, _) in PARTS.items()
    ]
    lines = [charts.smoothed(charts.thinned(line, 200)) for line in lines]
    title = f"{run.name}: seconds of a step"
    return Figure(title, charts.stacked(title, lines, [name for _, name in PARTS.values()]), "", {})


def _timeline(run: RunRecord) -> Figure:
    """The step of median length among the later half: what is usual once everything is warm."""
    later = sorted(run.rows[len(run.rows) // 2 :], key=lambda row: float(row["eopd_step_seconds"]))
    row = later[len(later) // 2]
    seconds = row["eopd_step_seconds"]
    lanes = []
    for stage, who, does, name in (
        ("generate", "Rollout engines", "some write", "f-rollout"),
        ("score", "Teachers", "some read", "f-teacher"),
    ):
        # what began before the step, between it and the one before, is drawn from the step's start
        busy = [(max(a, 0.0), b) for a, b in run.timeline.get(row["step"], {}).get(stage, []) if b > 0.0]
        label = f"{who}, busy {sum(b - a for a, b in busy) / seconds:.0%}"
        lanes.append(Lane(label, [(a, b, name, does) for a, b in busy]))
    spans, start = [], 0.0
    for part, (label, name) in PARTS.items():
        stop = start + (row.get(f"eopd_{part}_seconds") or 0.0)
        spans.append((start, stop, name, label))
        start = stop
    waited = sum(stop - start for start, stop, name, _ in spans if "wait" in name)
    lanes.append(Lane(f"Learner, waits {waited / seconds:.0%}", spans))
    title = f"{run.name}: step {row['step']}, {seconds:.2f} s"
    return Figure(title, charts.timeline(title, lanes, seconds), "", {})


def _table(columns: Sequence[Mapping[str, object]]) -> list[tuple[str, list[str], bool]]:
    """(key, its value in each column, whether they differ), those that differ first."""
    keys = dict.fromkeys(key for column in columns for key in column)
    rows = [(key, [str(column.get(key, "-")) for column in columns]) for key in keys]
    told = [(key, values, len(set(values)) > 1) for key, values in rows]
    return sorted(told, key=lambda row: not row[2])


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}"
