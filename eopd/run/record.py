"""What the files of a run hold, as it is written and read: rows of JSON lines, and the summary.

A field with a default may be missing in the file of an older version.
"""

import errno
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

Row = Mapping[str, float]  # by the names of ``telemetry/catalog.py``
ERRORS_OF_95_PERCENT: Final = 1.959964  # on both sides of a mean, of a normal distribution
RUN_ID: Final = "run-id"  # the file of the run's id, also of the one that a tracker has for it


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """A mean and its standard error, which is None where one prompt shows no spread."""

    mean: float
    standard_error: float | None = None

    @property
    def half_width(self) -> float | None:
        """Half of the 95 % interval of the mean; None where its error is not known."""
        error = self.standard_error
        return None if error is None else ERRORS_OF_95_PERCENT * error

    def shown(self, sign: Literal["", "+"] = "", digits: int = 3) -> str:
        """Returns both for people, as in ``0.512 ± 0.021``; with ``sign="+"`` a change, ``+0.512``."""
        mean, error = f"{self.mean:{sign}.{digits}f}", self.standard_error
        return mean if error is None else f"{mean} ± {error:.{digits}f}"


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Measurements before and after training, by the names of ``EvalStats`` and ``share: PART``, the
    share of a part in all tokens; None where nothing was measured.
    """

    before: Mapping[str, Measurement] | None = None
    after: Mapping[str, Measurement] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """The step of a checkpoint, and the value by which it was measured best: ``metric`` is such as
    ``held_out/reverse_kl``.
    """

    step: int
    metric: str
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What ``summary.json`` holds. ``step_seconds``: mean seconds of generate, score, train,
    weights, wait. ``incarnation`` counts how often the run was taken up again, and also how often its
    learner was lost (``learner_restarts``). ``best`` is None where no checkpoint was measured, or none
    is kept for it.
    """

    status: str
    steps: int = 0
    tokens: int = 0
    skipped_steps: int = 0
    incarnation: int = 0
    learner_restarts: int = 0
    wall_s: float = 0.0
    tokens_per_s: float = 0.0
    step_seconds: Mapping[str, float] = field(default_factory=dict)
    held_out: HeldOut = HeldOut()
    best: Best | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A held-out prompt, and what the student wrote before and after training."""

    prompt: str
    before: str
    after: str


def seconds_between(first: Row, last: Row) -> float:
    """Returns the seconds that a run took between two rows: by the clock where an earlier version
    wrote one of them.
    """
    name = "eopd_run_seconds_total"
    if name not in first or name not in last:
        name = "time"

    return last[name] - first[name]


def append_jsonl(path: Path, record: Mapping[str, object]) -> None:
    """Append a record as one line, in one write, so that neither a reader nor a crash between
    records meets half a line. Half a line that a lost machine left is ended first.

    Raises:
        OSError: the disk did not take all of it; none of it is left.
    """
    line = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode()
    with path.open("ab+", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        if end > 0:
            file.seek(end - 1)
            line = line if file.read(1) == b"\n" else b"\n" + line

        if file.write(line) < len(line):  # a disk that fills up takes a part, without an error
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
