"""Forward KL, from teacher to student: sum q log(q / p), over the outcomes that the teacher sent.

Both sides are log-probabilities of K + 1 outcomes: the teacher's K candidates and, last, the tail,
which is the rest of the vocabulary. An outcome at -inf on either side (the freed slot of a merged
end token, the tail where K = V) is left out.
"""

from typing import assert_never

import torch
from torch import Tensor

from eopd.config.loss import ForwardKl, RenormalizedForwardKl, TailForwardKl, TruncatedForwardKl


def divergence(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Returns ``sum a log(a / b)`` over the last axis, in nats.

    Outcomes at -inf on either side count 0 and get no gradient.
    """
    impossible = log_a.isinf() | log_b.isinf()
    # Masked before the product: 0 x inf would be NaN in value or gradient.
    log_a, log_b = log_a.masked_fill(impossible, 0.0), log_b.masked_fill(impossible, 0.0)
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def renormalized(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Returns KL(q~ || p), q~ the teacher renormalised on its candidates, p not: never negative
    (arXiv 2603.07079).

    The teacher itself is no minimum of it: the gradient drives the student's whole mass into the
    candidates.
    """
    candidates = log_q[..., :-1]
    return divergence(candidates - candidates.logsumexp(-1, keepdim=True), log_p[..., :-1])


def tail(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Returns the KL over the K + 1 outcomes: 0 where student and teacher agree on all of them,
    otherwise positive.

    This holds up to rounding: a float32 teacher's outcomes add up to 1 only nearly, which may make
    it negative by as much.
    """
    return divergence(log_q, log_p)


def truncated(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Returns the candidates' terms of the full KL alone: no KL, and negative where the student has
    more mass on the candidates than the teacher.
    """
    return divergence(log_q[..., :-1], log_p[..., :-1])


def forward_kl(form: ForwardKl, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Computes the forward KL of every token.

    Args:
        form: which form.
        log_p: student log-probabilities of the outcomes, [T, K + 1].
        log_q: teacher log-probabilities of the outcomes, [T, K + 1].

    Returns:
        [T], nats; differentiable in ``log_p``.
    """
    match form:
        case RenormalizedForwardKl():
            return renormalized(log_p, log_q)
        case TailForwardKl():
            return tail(log_p, log_q)
        case TruncatedForwardKl():
            return truncated(log_p, log_q)
        case _:
            assert_never(form)


def outcomes(candidates_TK: Tensor, rest_T: Tensor) -> Tensor:
    """Returns candidates and rest as the columns of one tensor [T, K + 1]."""
    return torch.cat([candidates_TK, rest_T.unsqueeze(-1)], dim=-1)
