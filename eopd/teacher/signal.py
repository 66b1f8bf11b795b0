"""What a teacher says of a response is checked, wherever it was computed: pure numpy. For the scoring
head's raw rows this is also the one place that knows the layout.

In: a ``TeacherSignal``, or float32 [R, 3 + 2 K], one row per response token, in the columns named
below. Out: arrays aligned by response position. Left out: any repair. A row that is no distribution
is an error, never clamped into one.
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
    """A teacher did not say what it must of a response; whoever gives it up names the teacher."""


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
        SignalError: wrong shape or type, an id that is none, or as ``checked``.

    Example: K = 1 and one token with probabilities 0.75 and 0.25, the second one sampled:
    ``[[0.562, -1.386, -1.386, -0.288, 0.0]]``.
    """
    expected = (num_response_tokens, num_columns(top_k))
    if raw.shape != expected or raw.dtype != np.float32:
        raise SignalError(f"raw signal is {raw.dtype} {raw.shape}, must be float32 {expected}")

    ids = raw[:, TOPK + top_k :]
    is_id = (ids >= 0) & (ids < MAX_EXACT_ID) & (ids == np.floor(ids))
    _require(is_id.all(axis=1), "has a broken token id")

    return checked(
        TeacherSignal(
            teacher=teacher,
            token_logprobs=raw[:, TOKEN].copy(),
            entropy=Exact(raw[:, ENTROPY].copy()),
            topk_ids=ids.astype(np.int32),
            topk_logprobs=raw[:, TOPK : TOPK + top_k].copy(),
            tail_logprobs=raw[:, TAIL].copy(),
        )
    )


def checked(signal: TeacherSignal) -> TeacherSignal:
    """Returns a signal of which every row is what a teacher can have said.

    Raises:
        SignalError: a value is not finite (but the tail's where K = V), candidates are unsorted or
            repeated, or the probabilities of the outcomes do not add up to one.
    """
    ids, logprobs = signal.topk_ids, signal.topk_logprobs
    token, tail = signal.token_logprobs, signal.tail_logprobs
    numbers = np.column_stack((signal.entropy_low, signal.entropy_high, token, logprobs))
    is_finite = np.isfinite(numbers).all(axis=1) & (tail < np.inf)
    _require(is_finite, "has a value that is not finite")
    _require(signal.entropy_low >= 0.0, "has a negative entropy")
    _require(token <= _SLACK, "has a positive log-probability of the sampled token")
    _require(np.all(np.diff(logprobs, axis=1) <= 0.0, axis=1), "has unsorted candidates")
    _require(np.all(ids >= 0, axis=1), "has a broken token id")
    is_distinct = np.all(np.diff(np.sort(ids, axis=1), axis=1) > 0, axis=1)
    _require(is_distinct, "names a candidate twice")
    mass = np.exp(logprobs, dtype=np.float64).sum(axis=1) + np.exp(tail, dtype=np.float64)
    _require(np.abs(mass - 1.0) <= _SLACK, "does not add up to probability one")

    return signal


def _require(good: BoolArray, fault: str) -> None:
    """Raises ``SignalError`` of the first row that is not good."""
    if not good.all():
        raise SignalError(f"row {int(np.argmin(good))} of the signal {fault}")
