"""Reads what a run directory holds for the report, also of a run that is under way, has failed, or
was cut off.

Lines that cannot be read are left out and counted; the page says so. The files are described in
``run/directory.py``.
"""

import itertools
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import yaml

from eopd.config import ConfigError
from eopd.config.load import flatten
from eopd.config.saved import require_directory
from eopd.run.reading import parse_object, read_rows, read_summary
from eopd.run.record import Measurement, Summary

_OF_EVERY_ROW: Final = ("step", "time", "eopd_step_seconds", "eopd_response_tokens_total")

Record: TypeAlias = Mapping[str, Any]  # one object of a JSON file of ours

HELD_OUT: Final[Mapping[str, tuple[str, str]]] = {
    "reverse_kl": ("reverse KL", "nats"),
    "forward_kl": ("forward KL", "nats"),
    "top1_agreement": ("top-1 agreement", "ratio"),
    "student_entropy": ("student entropy", "nats"),
    "teacher_entropy": ("teacher entropy", "nats"),
}


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A run. ``rows`` are those of ``metrics.jsonl``, at least one; a value that was not finite is
    None.
    """

    name: str
    config_text: str
    config: Mapping[str, object]  # by dotted key
    rows: Sequence[Record]
    summary: Summary
    held_out: Mapping[str, Record]  # by phase
    timeline: Mapping[int, Record]  # by step
    versions: Mapping[str, str]
    changes: Sequence[Record]  # what --resume changed, oldest first
    notes: Sequence[str]

    @property
    def threshold(self) -> float | None:
        """The teacher entropy in nats above which the gate opens; None where it is no such gate."""
        tau = self.config.get("loss.gate.tau")
        is_hard = self.config.get("loss.gate.kind") == "hard"
        return float(tau) if is_hard and isinstance(tau, int | float) else None

    @property
    def steps(self) -> list[int]:
        """Returns the step of every row."""
        return [row["step"] for row in self.rows]

    def column(self, name: str) -> list[float | None]:
        """Returns a metric over all rows; None where a row lacks it."""
        return [row.get(name) for row in self.rows]


def read_runs(directories: Sequence[Path]) -> list[RunRecord]:
    """Read run directories. Runs are told apart by their directories where two have one name.

    Raises:
        ConfigError: one is no run directory, or no step was completed in it.
    """
    names = [directory.resolve().name for directory in directories]
    unique = len(set(names)) == len(names)
    return [
        _read_run(directory, name if unique else str(directory))
        for directory, name in zip(directories, names, strict=True)
    ]


def _read_run(directory: Path, name: str) -> RunRecord:
    require_directory(directory)
    saved = directory / "config.yaml"
    if not saved.is_file():
        raise ConfigError(f"{directory} holds no run (it has no config.yaml)")

    notes: list[str] = []
    if (directory / "samples.jsonl").exists() and not (directory / "held_out.jsonl").exists():
        notes.append(
            "held_out.jsonl is missing: an older version kept the texts of samples alone, "
            "in samples.jsonl"
        )

    rows = _lines(directory / "metrics.jsonl", notes, *_OF_EVERY_ROW)
    if not rows:
        raise ConfigError(f"{directory}: no step was completed yet (metrics.jsonl has no rows)")

    text = saved.read_text(encoding="utf-8", errors="replace")

    return RunRecord(
        name=name,
        config_text=text,
        config=flatten(_yaml(text, notes)),
        rows=rows,
        summary=_summary(directory / "summary.json", notes),
        held_out={
            line["phase"]: line for line in _lines(directory / "held_out.jsonl", notes, "phase")
        },
        timeline={
            line["step"]: line for line in _lines(directory / "timeline.jsonl", notes, "step")
        },
        versions=_versions(directory / "versions.json", notes),
        changes=_lines(directory / "changes.jsonl", notes, "from_step"),
        notes=notes,
    )


def _lines(path: Path, notes: list[str], *keys: str) -> Sequence[Record]:
    """Returns the rows of a file that have some keys; none where there is no file, since not every
    run has come that far.
    """
    rows = read_rows(path)
    complete = [row for row in rows if None not in map(row.get, keys)]
    if unread := len(rows) - len(complete):
        notes.append(f"{unread} of {len(rows)} lines of {path.name} could not be read")

    return complete


def _summary(path: Path, notes: list[str]) -> Summary:
    with suppress(ConfigError):
        if (summary := read_summary(path)) is not None:
            return summary

    notes.append(f"{path.name} is missing or cannot be read")

    return Summary(status="unknown")


def _versions(path: Path, notes: list[str]) -> Mapping[str, str]:
    versions = parse_object(
        path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    )
    if not versions:
        notes.append(f"{path.name} is missing or cannot be read")

    return versions


def _yaml(text: str, notes: list[str]) -> object:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        notes.append("config.yaml cannot be read")
        return {}


def headline(run: RunRecord) -> Mapping[str, Any]:
    """Returns what a person wants to know first."""
    last = run.rows[-1]
    seconds = sum(row["eopd_step_seconds"] for row in run.rows)
    tokens = last["eopd_response_tokens_total"]
    before, after = run.summary.held_out.before or {}, run.summary.held_out.after or {}
    named = {**HELD_OUT, **_parts([before, after])}
    status, wall = run.summary.status, run.summary.wall_s
    if status in ("running", "unknown"):  # then the summary is as old as the last checkpoint
        wall = max(wall, last["time"] - run.rows[0]["time"] + run.rows[0]["eopd_step_seconds"])

    age = (
        {"since then": _clock(max(0.0, time.time() - last["time"]))} if status == "running" else {}
    )

    return {
        "name": run.name,
        "status": status,
        "notes": run.notes,
        "changes": [_changed(change) for change in run.changes],
        "facts": {
            "steps": f"{last['step']} of {run.config.get('run.batches', '?')}",
            "response tokens": f"{tokens:,.0f}",
            "tokens per second": f"{tokens / seconds:.1f}",
            "wall time": _clock(wall),
            "last step": time.strftime("%Y-%m-%d %H:%M", time.localtime(last["time"])),
            **age,
        },
        "held_out": [
            _change(label, unit, before.get(name), after.get(name))
            for name, (label, unit) in named.items()
        ],
    }


def _changed(change: Record) -> str:
    """Returns from which step on which keys were set to what."""
    values = change.get("changes", {}).items()
    settings = [f"{key} {_plain(old)} → {_plain(new)}" for key, (old, new) in values]
    return f"From step {change['from_step']}: {'; '.join(settings)}"


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _change(
    label: str, unit: str, before: Measurement | None, after: Measurement | None
) -> Mapping[str, str]:
    difference = "" if before is None or after is None else f"{after.mean - before.mean:+.3f}"
    return {
        "label": label,
        "unit": unit,
        "before": _measured(before),
        "after": _measured(after),
        "change": difference,
    }


def _parts(phases: Sequence[Mapping[str, Measurement]]) -> dict[str, tuple[str, str]]:
    """Returns label and unit of what was measured on a part of the tokens, such as
    ``reverse_kl: teacher unsure``.
    """
    names = {name for name in itertools.chain(*phases) if ": " in name}
    pairs = [name.split(": ", maxsplit=1) for name in sorted(names, reverse=True)]
    return {
        f"{quantity}: {part}": (f"{HELD_OUT[quantity][0]}, {part}", HELD_OUT[quantity][1])
        for quantity, part in pairs
        if quantity in HELD_OUT
    }


def comparison(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Returns what runs are compared by: a label, and the value in each run."""
    after = [run.summary.held_out.after or {} for run in runs]
    facts = [headline(run)["facts"] for run in runs]
    names = ("reverse_kl", "forward_kl", "student_entropy", "top1_agreement")
    labels = {name: HELD_OUT[name][0] for name in names} | {
        name: label for name, (label, _) in _parts(after).items()
    }
    rows = []
    for name, label in labels.items():
        values = [_measured(measurements.get(name)) for measurements in after]
        rows.append((f"held-out {label}, after", values))

    for name in ("response tokens", "wall time", "tokens per second"):
        rows.append((name, [run_facts[name] for run_facts in facts]))

    return rows


def measured_differently(runs: Sequence[RunRecord]) -> list[str]:
    """Returns the sections by which held-out numbers of the runs do not compare."""
    differing = []
    for section in ("teachers", "prompts.held_out", "evaluation", "rollout.temperature"):
        settings = [_settings(run, section) for run in runs]
        if any(other != settings[0] for other in settings):
            differing.append(section)

    return differing


def _settings(run: RunRecord, section: str) -> Mapping[str, object]:
    """Returns the keys of a section that change a measurement: not how many samples are shown."""
    return {
        key: value
        for key, value in run.config.items()
        if f"{key}.".startswith(f"{section}.") and key != "evaluation.samples"
    }


def _measured(measurement: Measurement | None) -> str:
    if measurement is None:
        return "-"

    error = measurement.standard_error
    return f"{measurement.mean:.3f}" + ("" if error is None else f" ± {error:.3f}")


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}"
