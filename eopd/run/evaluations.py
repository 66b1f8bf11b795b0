"""``evaluations.jsonl``: everything that was measured, a line each, and the checkpoints that it makes
the best.

    {"step": 5, "phase": "during", "name": "gsm8k", "time": 1790000000.0, "seconds": 3.2,
     "prompts": 64, "samples": 4, "measurements": {"avg_at_n": {"mean": 0.5, ...}, ...},
     "differences": {"avg_at_n": {"mean": 0.1, ...}, ...}, "by_prompt": {"avg_at_n": {"p1": 0.25, ...}, ...}}

A line is appended once its evaluation is complete. Of several lines of one step and name the last
one holds. ``differences`` are those to the first line of the name, over the same prompts; the first
one has none. In ``held_out`` the numbers of ``by_prompt`` are means per token, and its ``tokens``
are the weights of the prompts.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import TypeAdapter, ValidationError

from eopd.config import KeepBestConfig
from eopd.run.checkpoint import list_checkpoints, step_of
from eopd.run.reading import read_rows
from eopd.run.record import Best, Measurement
from eopd.run.storage import append_kept

Phase = Literal["before", "during", "after"]
Measurements = Mapping[str, Measurement]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One line of the file. ``seconds`` is what it took, ``time`` when it was complete, in seconds
    since 1970.
    """

    step: int
    phase: Phase
    name: str
    time: float
    seconds: float
    prompts: int
    samples: int
    measurements: Measurements
    differences: Measurements = field(default_factory=dict)
    by_prompt: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


_EVALUATION: Final = TypeAdapter(Evaluation)


def append_evaluation(path: Path, evaluation: Evaluation) -> None:
    """Appends a line.

    Raises:
        StorageError: the disk did not take it.
    """
    record: dict[str, Any] = asdict(evaluation)
    for name in ("differences", "by_prompt"):
        if not record[name]:
            del record[name]

    append_kept(path, record)


def final(evaluations: Iterable[Evaluation], steps: int) -> Mapping[str, Measurements]:
    """Returns what was measured after the last of so many steps, by name; nothing of a run that went
    on since.
    """
    last = ("after", steps)
    return {one.name: one.measurements for one in evaluations if (one.phase, one.step) == last}


def read_evaluations(path: Path) -> list[Evaluation]:
    """Returns the evaluations of a file, in order; none where there is no file. A line that is
    damaged is left out.
    """
    evaluations = []
    for row in read_rows(path):
        try:
            evaluations.append(_EVALUATION.validate_python(row))
        except ValidationError:
            continue

    return evaluations


def newest(evaluations: Iterable[Evaluation]) -> list[Evaluation]:
    """Returns the last evaluation of every name."""
    return list({evaluation.name: evaluation for evaluation in evaluations}.values())


def ranked(evaluations: Iterable[Evaluation], keep_best: KeepBestConfig) -> list[Best]:
    """Returns the steps that were measured, the best first; of equal ones the earlier is better.

    Left out is the student before training, of which there is no checkpoint.
    """
    name, _, metric = keep_best.metric.partition("/")
    values: dict[int, float] = {}
    for evaluation in evaluations:
        if evaluation.name != name or evaluation.step == 0:
            continue

        measured = evaluation.measurements.get(metric)
        if measured is not None and math.isfinite(measured.mean):
            values[evaluation.step] = measured.mean

    sign = 1.0 if keep_best.mode == "min" else -1.0
    steps = sorted(values, key=lambda step: (sign * values[step], step))

    return [Best(step=step, metric=keep_best.metric, value=values[step]) for step in steps]


def best_checkpoints(
    checkpoints: Path, evaluations: Iterable[Evaluation], keep_best: KeepBestConfig | None
) -> Sequence[Best]:
    """Returns the best checkpoints that are there and whole, the best first, at most
    ``keep_best.n``; none where ``keep_best`` is None.
    """
    if keep_best is None:
        return ()

    whole = {step_of(path) for path in list_checkpoints(checkpoints)}
    best = [one for one in ranked(evaluations, keep_best) if one.step in whole]
    return best[: keep_best.n]
