"""Does an engine compute with the learner's weights? Both read a fixed text, and their log-probabilities are compared.

A bucket's hash says that the right bytes arrived; only the engine's own output says that they were loaded, repacked and
used. The numbers are the engine's (``VllmRolloutEngine.probe``) and the learner's at temperature 1. Left out: finding
a fault smaller than the difference of two correct implementations, such as one step of a small learning rate in
bfloat16; a stale tensor grows beyond it within a run.
"""

from typing import Literal

import numpy as np

from eopd.types import Float32Array

# Mean absolute difference in nats. In float32 two right implementations differ by the order of their sums: 1e-6 to 1e-4
# at the logits of small models. In bfloat16 a logit of 16 to 32 is rounded to steps of 1/8, and every layer adds its
# own rounding: 0.01 to 0.05 is usual between two kernels, a wrong tensor costs 0.5 and more.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}


class ProbeError(RuntimeError):
    """An engine does not compute with the weights that it was sent."""


def compare_probe(
    engine_logprobs: Float32Array, learner_logprobs: Float32Array, *, dtype: Literal["float32", "bfloat16"]
) -> float:
    """Compare what engine and learner give to the same text.

    Args:
        engine_logprobs: float32[N - 1], nats.
        learner_logprobs: float32[N - 1], nats, of the same tokens.
        dtype: the student's, ``student.dtype``; chooses the tolerance.

    Returns:
        The mean absolute difference in nats.

    Raises:
        ProbeError: the difference is above the tolerance, or is no number.
        ValueError: the two speak about different numbers of tokens, or about none.
    """
    if engine_logprobs.shape != learner_logprobs.shape or engine_logprobs.size == 0:
        raise ValueError(f"probes of {engine_logprobs.shape} and {learner_logprobs.shape} tokens")
    gap = float(np.abs(engine_logprobs.astype(np.float64) - learner_logprobs).mean())
    if not gap <= TOLERANCE[dtype]:  # NaN too
        raise ProbeError(
            f"the engine's log-probabilities of the probe are {gap:.3g} nats from the learner's on average, more than"
            f" {TOLERANCE[dtype]:g} in {dtype}: it does not compute with the weights it was sent"
        )
    return gap
