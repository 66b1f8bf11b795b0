"""What top-k log-probabilities prove about the rest: the mass outside, and certified bounds on the
entropy. Pure numpy.

With p_1 >= ... >= p_k the known probabilities and m the mass of the V - k others, each of which is
at most p_k:

* lowest: the others are as concentrated as they may be, so each contributes at least ``-q log
min(m, p_k)``;
* highest: they are all equal, and contribute ``m log((V - k) / m)``.

Both are attained. A server rounds: its float32 log-softmax shifts a whole row by what its sum over
V is off (torch on CPU: 1.3e-4 at V = 152k, 3e-5 at 50k). The bounds allow for ``logprob_error`` in
every log-probability, so they hold for the distribution itself, and the exact entropy of k = V
comes with that much of room.

Left out: a sampled token outside the top k. It would tell a little more, but then a bound would
depend on which token was sampled, and with it the gate.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from eopd.types import Bounds, Float32Array

Float64Array = npt.NDArray[np.float64]

_TINY: Final = np.finfo(np.float64).tiny
# what float32 probabilities that add up to one, or more, may have lost
_LEAST_MASS: Final = 2.0**-24


def logprob_error(vocab_size: int) -> float:
    """Returns how far a float32 log-probability may be from the exact one, in nats: rounding, and a sum of
    V terms in 32 lanes of unit roundoff 2^-24.
    """
    return 2.0**-20 + vocab_size * 2.0**-29


def tail_logprobs(topk_logprobs: Float32Array, vocab_size: int) -> Float32Array:
    """Log of the mass outside the top k, the difference to one taken in float64.

    It is kept where mass can be: at least 2^-24, so that rounding never makes it nothing, and at
    most ``(V - k) p_k``.

    Args:
        topk_logprobs: float32 [R, K], nats, most likely first.
        vocab_size: V >= K.

    Returns:
        float32 [R]; -inf where K = V.

    Example: ``[[log 0.6, log 0.3]]`` and V = 4 give ``[log 0.1]``.
    """
    probs = np.exp(topk_logprobs, dtype=np.float64)
    rest = vocab_size - probs.shape[1]
    if rest == 0:
        return np.full(len(probs), -np.inf, np.float32)

    mass = np.minimum(np.maximum(1.0 - probs.sum(axis=1), _LEAST_MASS), rest * probs[:, -1])
    return _log(mass).astype(np.float32)


def entropy_bounds(topk_logprobs: Float32Array, vocab_size: int) -> Bounds:
    """The lowest and highest entropy that a distribution with this top k can have.

    Args:
        topk_logprobs: float32 [R, K], nats, most likely first, each within ``logprob_error`` of
            exact.
        vocab_size: V >= K.

    Returns:
        Bounds in nats, float32 [R] each.

    Example: ``[[log 0.6, log 0.3]]`` and V = 4: 0.1 is left to two tokens. Held by one of them, the
    entropy is 0.898; shared equally, 0.967.
    """
    logprobs = topk_logprobs.astype(np.float64)
    probs = np.exp(logprobs)
    rest = vocab_size - probs.shape[1]
    error = logprob_error(vocab_size)
    inside = -(probs * logprobs).sum(axis=1)
    mass = 1.0 - probs.sum(axis=1)
    most = np.clip(mass + error, 0.0, rest * probs[:, -1] * (1.0 + error))
    least = np.clip(mass - error, 0.0, most)
    slack = error * (1.0 + inside)  # of the known part, to first order
    low = inside - least * _log(np.minimum(least, probs[:, -1])) - slack
    high = inside - most * _log(most / max(rest, 1)) + slack

    return Bounds(low=np.maximum(low, 0.0).astype(np.float32), high=high.astype(np.float32))


def _log(values: Float64Array) -> Float64Array:
    """Logarithm whose product with a zero is zero."""
    logarithm: Float64Array = np.log(np.maximum(values, _TINY))
    return logarithm
