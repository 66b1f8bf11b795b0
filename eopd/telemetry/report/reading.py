"""Reads what a run directory holds for the report, also of a run that is under way, has failed, or
was cut off.

Lines that cannot be read are left out and counted; the page says so. The files are described in
``run/directory.py``.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Final, TypeAlias

import yaml

from eopd.config import ConfigError
from eopd.config.load import flatten
from eopd.config.saved import require_directory
from eopd.run.evaluations import Evaluation, Measurements, final, read_evaluations
from eopd.run.reading import read_object, read_rows, read_summary
from eopd.run.record import Summary, seconds_between
from eopd.telemetry.evaluations import MEASURED
from eopd.telemetry.report.public import Public

_MEASURED: Final = {
    "phase": str,
    "step": int,
    "samples": list,
    "student_entropy_counts": list,
    "teacher_entropy_counts": list,
}
_OF_EVERY_ROW: Final = ("step", "time", "eopd_step_seconds", "eopd_response_tokens_total")

Record: TypeAlias = Mapping[str, Any]  # one object of a JSON file of ours


@dataclass(frozen=True, slots=True, kw_only=True)
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
    evaluations: Sequence[Evaluation]  # by step
    timeline: Mapping[int, Record]  # by step
    versions: Mapping[str, object]
    provenance: Record  # commit and machines
    parent: Record  # run and step that this one was forked from
    changes: Sequence[Record]  # what --resume changed, oldest first
    notes: Sequence[str]

    @property
    def threshold(self) -> float | None:
        """The teacher entropy in nats above which the gate opens; None where it is no such gate, or
        does nothing.
        """
        tau = self.config.get("loss.gate.tau")
        is_hard = self.config.get("loss.gate.kind") == "hard" and self.config.get("loss.alpha") != 0
        return float(tau) if is_hard and isinstance(tau, int | float) else None

    @property
    def is_under_way(self) -> bool:
        """Whether the summary is as old as the last checkpoint, since the run has not ended."""
        return self.summary.status in ("starting", "running", "unknown")

    @property
    def wall_s(self) -> float:
        """The seconds of the run so far."""
        first, last = self.rows[0], self.rows[-1]
        of_rows = seconds_between(first, last) + first["eopd_step_seconds"]
        return max(self.summary.wall_s, of_rows) if self.is_under_way else self.summary.wall_s

    @property
    def steps(self) -> list[int]:
        """The step of every row."""
        return [row["step"] for row in self.rows]

    def column(self, name: str) -> list[float | None]:
        """Returns a metric over all rows; None where a row lacks it."""
        return [row.get(name) for row in self.rows]

    def measured(self, name: str) -> list[Evaluation]:
        """Returns the evaluations of one name, oldest first."""
        return [evaluation for evaluation in self.evaluations if evaluation.name == name]

    @property
    def final(self) -> Mapping[str, Measurements]:
        """What was measured after the last step, by name; nothing of a run that went on since."""
        return final(self.evaluations, self.summary.steps)

    def checkpoints(self) -> Mapping[int, float]:
        """Returns the seconds that each checkpoint took, by step, as far as rows tell."""
        found = {}
        for row in self.rows:
            step, seconds = row.get("eopd_checkpoint_step"), row.get("eopd_checkpoint_seconds")
            if step is not None and seconds is not None:
                found[int(step)] = float(seconds)

        return found


class NoStepError(ConfigError):
    """No step was completed in a run yet."""


def read_runs(
    directories: Sequence[Path],
    *,
    public: bool = False,
    leave_out: Callable[[str], None] | None = None,
) -> list[RunRecord]:
    """Read run directories. Runs are told apart by their directories where two have one name, or by
    a number.

    Args:
        directories: the run directories.
        public: whether to leave out paths, hosts and users.
        leave_out: is told of runs without a step, and of those that cannot be read.

    Raises:
        ConfigError: one is no run directory, or no step was completed in it; with ``leave_out``, in
            none of them.
    """
    names = [directory.resolve().name for directory in directories]
    if len(set(names)) < len(names) and public:
        names = [f"{name} ({number})" for number, name in enumerate(names, 1)]
    elif len(set(names)) < len(names):
        names = [str(directory) for directory in directories]

    runs = []
    for directory, name in zip(directories, names, strict=True):
        try:
            runs.append(_read_run(directory, name, public))
        except (NoStepError, OSError) as fault:
            if leave_out is None:
                raise

            leave_out(f"left out: {fault}")

    if not runs:
        raise ConfigError("there is no run to show")

    return runs


def _read_run(directory: Path, name: str, public: bool) -> RunRecord:
    require_directory(directory)
    saved = directory / "config.yaml"
    if not saved.is_file():
        raise ConfigError(f"{directory} holds no run (it has no config.yaml)")

    notes: list[str] = []
    rows = _lines(directory / "metrics.jsonl", notes, dict.fromkeys(_OF_EVERY_ROW, Real))
    if not rows:
        raise NoStepError(f"{directory}: no step was completed yet (metrics.jsonl has no rows)")

    config_text = saved.read_text(encoding="utf-8", errors="replace")
    config = _yaml(config_text, notes)
    summary = _summary(directory / "summary.json", notes)
    held_out = _lines(directory / "held_out.jsonl", notes, _MEASURED)
    timeline = _lines(directory / "timeline.jsonl", notes, {"step": int})
    evaluations = _evaluations(directory / "evaluations.jsonl", notes)
    settings: dict[str, Any] = {
        "versions": read_object(directory / "versions.json"),
        "parent": read_object(directory / "parent.json"),
        "changes": _lines(directory / "changes.jsonl", notes, {"from_step": int}),
    }
    if not settings["versions"]:
        notes.append("versions.json is missing or cannot be read")

    if public:
        without = Public([config, settings])
        name, config = without.text(name), without.settings(config)
        config_text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        settings, held_out = without.settings(settings), without.texts(held_out)

    versions = dict(settings["versions"])
    provenance = versions.pop("provenance", {})

    return RunRecord(
        name=name,
        config_text=config_text,
        config=flatten(config),
        rows=rows,
        summary=summary,
        held_out=_ends(held_out),
        evaluations=evaluations,
        timeline={line["step"]: line for line in timeline},
        versions=flatten(versions),
        provenance=provenance if isinstance(provenance, dict) else {},
        parent=settings["parent"],
        changes=settings["changes"],
        notes=notes,
    )


def _lines(path: Path, notes: list[str], kinds: Mapping[str, type]) -> list[dict[str, Any]]:
    """Returns the rows of a file that have some keys, with values of these kinds; none where there is
    no file, since not every run has come that far.
    """
    rows = list(read_rows(path))
    complete = [
        row for row in rows if all(isinstance(row.get(key), kind) for key, kind in kinds.items())
    ]
    _note_unread(path, notes, len(rows), len(complete))
    return complete


def _note_unread(path: Path, notes: list[str], num_lines: int, num_read: int) -> None:
    if unread := num_lines - num_read:
        notes.append(f"{unread} of {num_lines} lines of {path.name} could not be read")


def _summary(path: Path, notes: list[str]) -> Summary:
    with suppress(ConfigError):
        if (summary := read_summary(path)) is not None:
            return summary

    notes.append(f"{path.name} is missing or cannot be read")

    return Summary(status="unknown")


def _yaml(text: str, notes: list[str]) -> object:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        notes.append("config.yaml cannot be read")
        return {}


def _evaluations(path: Path, notes: list[str]) -> list[Evaluation]:
    """Returns what was measured, by step; of several lines of one step and name the last one
    holds.
    """
    evaluations = read_evaluations(path)
    _note_unread(path, notes, len(list(read_rows(path))), len(evaluations))
    holding = {(evaluation.step, evaluation.name): evaluation for evaluation in evaluations}
    return sorted(holding.values(), key=lambda evaluation: evaluation.step)


def _ends(lines: Sequence[Record]) -> Mapping[str, Record]:
    """Returns the last measurement of each phase; those during training give way to the one after
    it.
    """
    by_phase = {line["phase"]: line for line in lines}
    if "after" in by_phase:
        by_phase.pop("during", None)

    return by_phase


def parts(phases: Sequence[Measurements]) -> dict[str, tuple[str, str]]:
    """Returns label and unit of what was measured on a part of the tokens, such as
    ``reverse_kl: teacher unsure``.
    """
    names = {name for name in itertools.chain(*phases) if ": " in name}
    pairs = [name.split(": ", maxsplit=1) for name in sorted(names, reverse=True)]
    return {
        f"{quantity}: {part}": (f"{MEASURED[quantity][0]}, {part}", MEASURED[quantity][1])
        for quantity, part in pairs
        if quantity in MEASURED
    }
