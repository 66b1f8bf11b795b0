"""Reads the files of a run directory, which may be of another version of eopd, or damaged since.

A row that was cut short by a loss of power is left out. What a run can continue without has a
default; what it cannot is a ``ConfigError`` that names the way out.
"""

import json
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from eopd.config import Config, ConfigError
from eopd.config.messages import explain
from eopd.config.saved import parse_saved, read_saved
from eopd.run.record import Sample, Summary


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeRecord:
    """A line of ``changes.jsonl``: ``changes`` has each key's value before and after,
    ``before`` the whole config.
    """

    from_step: int
    time: float
    changes: dict[str, list[object]]
    before: dict[str, object]


_SUMMARY: Final = TypeAdapter(Summary)
_CHANGE: Final = TypeAdapter(ChangeRecord)


def instead_of_going_on(path: Path) -> str:
    """Returns what can be done with a run directory whose run cannot go on."""
    return (
        "Put it back from a copy; or write the student of this run with `eopd export "
        f"{path}`, and start a new run from it (student.model, and another run.name)"
    )


def read_summary(path: Path) -> Summary | None:
    """Returns what ``summary.json`` holds; None where there is no such file.

    Raises:
        ConfigError: it has no status, or a value of another type than was written.
    """
    if not path.exists():
        return None

    return read_saved(path, _SUMMARY, instead_of_going_on(path.parent))


def read_changes(path: Path) -> list[ChangeRecord]:
    """Returns the lines of ``changes.jsonl``; none where there is no such file.

    Raises:
        ConfigError: a line is no change.
    """
    lines = (
        enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n"), 1)
        if path.exists()
        else ()
    )
    return [
        parse_saved(f"{path}: line {number}", line, _CHANGE, _without_changes(path))
        for number, line in lines
        if line
    ]


def config_before(path: Path, change: ChangeRecord) -> Config:
    """Returns the config from before a change.

    Raises:
        ConfigError: this version reads no such config.
    """
    try:
        return Config.model_validate(change.before)
    except ValidationError as error:
        lines = [explain(detail, Config)[1] for detail in error.errors(include_url=False)]
        raise ConfigError(
            f"{path}: the config from before step {change.from_step} cannot be read: "
            f"{'; '.join(lines)}. {_without_changes(path)}"
        ) from None


def read_rows(path: Path, last: int | None = None) -> Iterator[dict[str, Any]]:
    """Yields the rows of a file of JSON lines, or those of its last lines, one by one, however many
    there are; none where there is no file. A line that is no JSON object is an empty row.
    """
    if not path.exists():
        return

    # newline: a text may hold the other separators of Unicode
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        lines = file if last is None else deque(file, maxlen=last)
        yield from map(parse_object, filter(str.strip, lines))


def read_samples(path: Path) -> list[Sample]:
    """Returns the samples of ``held_out.jsonl`` of prompts that have one before and one after
    training, each of the last such measurement.
    """
    rows = list(read_rows(path))
    before = _last_samples(rows, "before")
    return [
        Sample(
            prompt=after["prompt"],
            before=before[prompt_id]["response"],
            after=after["response"],
        )
        for prompt_id, after in _last_samples(rows, "after").items()
        if prompt_id in before
    ]


def _last_samples(rows: Sequence[dict[str, Any]], phase: str) -> dict[str, dict[str, str]]:
    """Returns the whole samples of the last measurement of a phase, by prompt."""
    of_phase = [row for row in rows if row.get("phase") == phase]
    samples = of_phase[-1].get("samples") if of_phase else []
    whole = {}
    for sample in samples if isinstance(samples, list) else []:
        texts = sample if isinstance(sample, dict) else {}
        if all(isinstance(texts.get(key), str) for key in ("prompt_id", "prompt", "response")):
            whole[texts["prompt_id"]] = texts

    return whole


def read_object(path: Path) -> dict[str, Any]:
    """Returns what a JSON file holds; nothing where it cannot be read or holds something else."""
    try:
        return parse_object(path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return {}


def parse_object(text: str) -> dict[str, Any]:
    """Returns the JSON object that a text holds; an empty one where it holds something else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}

    # the names are the same in every row
    return {sys.intern(key): kept for key, kept in value.items()} if isinstance(value, dict) else {}


def up_to_step(rows: Iterable[dict[str, Any]], step: float) -> Iterator[dict[str, Any]]:
    """Yields the rows that name a step up to ``step``."""
    return (row for row in rows if is_up_to_step(row, step))


def is_up_to_step(row: dict[str, Any], step: float) -> bool:
    """Tells whether a row names a step up to ``step``."""
    return isinstance(row.get("step"), int) and row["step"] <= step


def _without_changes(path: Path) -> str:
    return f"Remove {path.name} to go on without the record of what was changed"
