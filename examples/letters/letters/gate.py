"""A gate on two numbers of each token."""

from typing import TYPE_CHECKING

from eopd.plugins import GateTokens

if TYPE_CHECKING:
    from torch import Tensor


def unsure_and_surprised(tokens: GateTokens, *, tau: float = 0.8, nats: float = 2.0) -> "Tensor":
    """Returns 1 where the teacher's entropy is above ``tau`` nats and the student took a token to
    which it gave a log-probability below ``-nats``; else 0.
    """
    unsure = tokens.teacher_entropy > tau
    surprised = tokens.rollout_logprobs < -nats
    return (unsure & surprised).float()
