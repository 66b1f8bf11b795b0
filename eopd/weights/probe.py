"""Does an engine compute with the learner's weights? Both read a fixed text, and their
log-probabilities are compared.

A bucket's hash proves that the right bytes arrived; only the engine's own output proves that they
were loaded, repacked and used. The log-probabilities are the engine's (``VllmRolloutEngine.probe``)
and the learner's (``LearnerRank.probe``) at temperature 1. Left out: finding a fault smaller than
the difference of two correct implementations, such as one step of a small learning rate in
bfloat16.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from eopd.types import Float32Array, Int32Array, PromptSample

# Mean absolute difference in nats. In float32 two right implementations differ by the order of
# their sums: below 1e-4 on the tiny models of the tests. In bfloat16 a logit between 16 and 32 has
# steps of 1/8, between 32 and 64 of 1/4, and only the mean over many tokens is steady: vLLM and
# transformers, both right, differ by 0.04 to 0.07 on SmolLM2 135M and by 0.07 to 0.10 on its pruned
# version, most on text that the model finds improbable. So the probe is some hundred tokens of
# prompts, which the student finds probable.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2}
PROBE_TOKENS: Final = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """The text that engines and learner are compared on, and how often.

    ``token_ids`` is int32[N] with N > 1, ``dtype`` the student's. The comparison is made at one of
    ``every`` publishes; 0 makes none.
    """

    token_ids: Int32Array
    dtype: Literal["float32", "bfloat16"]
    every: int


def probe_text(prompts: Sequence[PromptSample]) -> Int32Array:
    """Returns int32[N], the first tokens of these prompts: at least two, so that one has a
    predecessor.
    """
    first = np.concatenate([prompt.token_ids for prompt in prompts[:PROBE_TOKENS]])
    return np.resize(first, max(2, min(len(first), PROBE_TOKENS)))


class ProbeError(RuntimeError):
    """An engine does not compute with the weights that it was sent."""


def compare_probe(
    engine_logprobs: Float32Array,
    learner_logprobs: Float32Array,
    *,
    dtype: Literal["float32", "bfloat16"],
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
    """
    gap = float(np.abs(engine_logprobs.astype(np.float64) - learner_logprobs).mean())
    if not gap <= TOLERANCE[dtype]:  # NaN too
        raise ProbeError(
            f"the engine's log-probabilities of the probe are {gap:.3g} nats from the "
            f"learner's on average, more than {TOLERANCE[dtype]:g} in {dtype}: it does not "
            "compute with the weights it was sent"
        )

    return gap
