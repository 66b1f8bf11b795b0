"""From the scoring head's raw rows to a checked ``TeacherSignal``: pure numpy, and the one place
that knows the layout.

In: float32 [R, 3 + 2 K], one row per response token, in the columns named below. Out: arrays
aligned by response position. ``write_signal`` is the way back, for a signal that travels. Left out:
any repair. A row that is no distribution is an error, never clamped into one.
"""

from typing import Final

import numpy as np

from eopd.types import BoolArray, Exact, Float32Array, TeacherSignal

ENTROPY: Final = 0
TOKEN: Final = 1
TAIL: Final = 2
TOPK: Final = 3  # K log-probabilities, most likely first, and then their K ids

MAX_EXACT_ID: Final = 1 << 24  # below it every id is an exact float32
_SLACK: Final = 1e-3  # nats, or probability: far above float32 noise, far below a defect


class SignalError(ValueError):
    """The raw rows are not what a teacher can have said."""


def num_columns(top_k: int) -> int:
    """Width of a raw row: entropy, sampled token, tail, and ``top_k`` pairs."""
    return TOPK + 2 * top_k


def read_signal(
    raw: Float32Array, *, teacher: str, num_response_tokens: int, top_k: int
) -> TeacherSignal:
    """Check and split raw rows.

    Args:
        raw: float32 [R, 3 + 2 K]; entropy in nats, log-probabilities in nats, ids as whole floats.
        teacher: the teacher's name, carried along.
        num_response_tokens: R.
        top_k: K.

    Raises:
        SignalError: wrong shape or type, a value that is not finite, unsorted or repeated
            candidates, or outcomes whose probabilities do not add up to one.

    Example: K = 1 and one token with probabilities 0.75 and 0.25, the second one sampled:
    ``[[0.562, -1.386, -1.386, -0.288, 0.0]]``.
    """
    expected = (num_response_tokens, num_columns(top_k))
    if raw.shape != expected or raw.dtype != np.float32:
        raise SignalError(
            f"teacher {teacher}: raw signal is {raw.dtype} {raw.shape}, must be float32 {expected}"
        )

    entropy, token, tail = raw[:, ENTROPY], raw[:, TOKEN], raw[:, TAIL]
    logprobs, ids = raw[:, TOPK : TOPK + top_k], raw[:, TOPK + top_k :]
    _require(
        np.isfinite(raw).all(axis=1) | _only_tail_is_empty(raw),
        "has a value that is not finite",
        teacher,
    )
    _require(entropy >= 0.0, "has a negative entropy", teacher)
    _require(token <= _SLACK, "has a positive log-probability of the sampled token", teacher)
    _require(np.all(np.diff(logprobs, axis=1) <= 0.0, axis=1), "has unsorted candidates", teacher)
    _require(
        ((ids >= 0) & (ids < MAX_EXACT_ID) & (ids == np.floor(ids))).all(axis=1),
        "has a broken token id",
        teacher,
    )
    _require(
        np.all(np.diff(np.sort(ids, axis=1), axis=1) > 0, axis=1),
        "names a candidate twice",
        teacher,
    )
    mass = np.exp(logprobs, dtype=np.float64).sum(axis=1) + np.exp(tail, dtype=np.float64)
    _require(np.abs(mass - 1.0) <= _SLACK, "does not add up to probability one", teacher)

    return TeacherSignal(
        teacher=teacher,
        token_logprobs=token.copy(),
        entropy=Exact(entropy.copy()),
        topk_ids=ids.astype(np.int32),
        topk_logprobs=logprobs.copy(),
        tail_logprobs=tail.copy(),
    )


def write_signal(signal: TeacherSignal) -> Float32Array:
    """The raw rows that ``read_signal`` reads: float32 [R, 3 + 2 K], a new array.

    Raises:
        TypeError: the entropy is known only within bounds, for which there are no columns.
    """
    if not isinstance(signal.entropy, Exact):
        raise TypeError(f"teacher {signal.teacher}: a signal with entropy bounds has no raw rows")

    columns = (signal.entropy.entropy, signal.token_logprobs, signal.tail_logprobs)
    return np.column_stack((*columns, signal.topk_logprobs, signal.topk_ids.astype(np.float32)))


def _only_tail_is_empty(raw: Float32Array) -> BoolArray:
    """Rows whose one infinite value is a tail of no mass: K = V."""
    rest = np.delete(raw, TAIL, axis=1)
    return np.isneginf(raw[:, TAIL]) & np.isfinite(rest).all(axis=1)


def _require(good: BoolArray, fault: str, teacher: str) -> None:
    """Raises ``SignalError`` of the first row that is not good."""
    if not good.all():
        raise SignalError(f"teacher {teacher}: row {int(np.argmin(good))} of the signal {fault}")
