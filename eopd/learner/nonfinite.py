"""An optimiser step whose loss or gradient is not finite: which rows cause it, and a record on disk
of what the loss was given.

runs/<name>/broken/batch-000012-step-0/
    rows.json              what was not finite, and the rows of all ranks
    rank-0.safetensors     the packed micro-batches of a rank: ``<micro-batch>.<column>``
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from eopd.learner.collate import Packed
from eopd.types import RunFailedError, TrajectoryKey

# Only these may say "impossible": a freed slot, an empty tail.
_MAY_BE_IMPOSSIBLE = ("teacher_topk_logprobs_TK", "teacher_tail_logprobs_T")
_NAMED_ROWS = 5  # in the message; the file has all


class NonFiniteUpdateError(RunFailedError):
    """A loss or gradient was not finite, and no more optimiser steps may be skipped.

    The update was applied on no rank.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokenRow:
    """A response token, and the columns of its row that are not finite."""

    trajectory: TrajectoryKey
    position: int  # in the response
    columns: tuple[str, ...]

    def __str__(self) -> str:
        return f"{tuple(self.trajectory)} token {self.position} ({', '.join(self.columns)})"


def find_rows(
    packed: Packed, keys: Sequence[TrajectoryKey], student_logprobs_T: Tensor
) -> Iterator[BrokenRow]:
    """Yields the loss rows with an input of the loss, or a student log-probability, that is not
    finite.

    Args:
        packed: a micro-batch.
        keys: the names of its trajectories, in its order.
        student_logprobs_T: of the sampled tokens, 0 where masked.
    """
    bad = {
        name: _not_finite(name, column)
        for name, column in packed.tokens.columns().items()
        if column.is_floating_point()
    }
    bad["student_logprobs_T"] = ~student_logprobs_T.isfinite()
    del bad["gate_T"]  # NaN where something else is to blame

    for key, rows in zip(keys, packed.rows, strict=True):
        for position, row in enumerate(range(rows.start, rows.stop)):
            names = tuple(name for name, wrong_T in bad.items() if wrong_T[row])
            if names and packed.tokens.loss_mask_T[row]:
                yield BrokenRow(trajectory=key, position=position, columns=names)


def dump(
    directory: Path,
    quantity: str,
    rows: Sequence[BrokenRow],
    keys: Sequence[TrajectoryKey],
    *,
    rank: int,
    packs: Sequence[Packed],
) -> None:
    """Write the columns of a rank's micro-batches; rank 0 also writes ``rows.json``.

    Args:
        directory: where to write.
        quantity: ``loss`` or ``gradient``, whichever was not finite.
        rows: the rows of all ranks that are not finite.
        keys: all trajectories of the step.
        rank: of this process.
        packs: its micro-batches.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{index}.{name}": column.clone(memory_format=torch.contiguous_format)
        for index, packed in enumerate(packs)
        for name, column in _columns(packed).items()
    }
    save_file(tensors, directory / f"rank-{rank}.safetensors")
    if rank > 0:
        return

    record = {
        "what": quantity,
        "rows": [asdict(row) for row in rows],
        "trajectories": [list(key) for key in keys],
    }
    (directory / "rows.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def explain(
    quantity: str, rows: Sequence[BrokenRow], keys: Sequence[TrajectoryKey], directory: Path
) -> str:
    """Returns one line for people: what was not finite, the first rows (or trajectories, where no
    row shows it), and where the rest is.
    """
    names = [str(row) for row in rows] or [str(tuple(key)) for key in keys]
    more = f" and {len(names) - _NAMED_ROWS} more" if len(names) > _NAMED_ROWS else ""
    kind = "rows" if rows else "no row is to blame; trajectories"
    listing = f"{kind}: {', '.join(names[:_NAMED_ROWS])}{more}"
    return f"the {quantity} is not finite, nothing was applied; {listing}; see {directory}"


def _columns(packed: Packed) -> dict[str, Tensor]:
    inputs = {"input_ids_T": packed.input_ids_T, "position_ids_T": packed.position_ids_T}
    return packed.tokens.columns() | inputs


def _not_finite(name: str, column: Tensor) -> Tensor:
    wrong = ~column.isfinite()
    if name in _MAY_BE_IMPOSSIBLE:
        wrong &= column != -torch.inf

    return wrong.reshape(len(column), -1).any(1)
