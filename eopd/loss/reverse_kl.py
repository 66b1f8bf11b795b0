"""Reverse KL, from student to teacher: the term that every token has.

``sampled`` is a clipped policy gradient on the sampled token, whose advantage is log q - log p_old:
its expected gradient is that of KL(p || q). (Back-propagating the mean of log p - log q itself
would be wrong: that gradient does not know the teacher.) ``topk_tail`` is the KL itself, over the
teacher's candidates and the tail.
"""

import math
from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor

from eopd.config.loss import NoReverseKl, ReverseKl, SampledReverseKl, TopkTailReverseKl
from eopd.loss.forward_kl import divergence


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledTokens:
    """Log-probabilities of the sampled tokens, each [T], under the four policies that matter.

    ``bonus_T`` is a verifier's advantage, added to the teacher's.
    """

    student_logprobs_T: Tensor
    old_logprobs_T: Tensor
    rollout_logprobs_T: Tensor
    teacher_logprobs_T: Tensor
    bonus_T: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReverseKlTerm:
    """The loss of every token, its importance weight, and whether that was capped and the loss
    clipped, each [T]; only ``loss_T`` has gradients.
    """

    loss_T: Tensor
    importance_T: Tensor
    capped_T: Tensor
    clipped_T: Tensor


def sampled(form: SampledReverseKl, tokens: SampledTokens) -> ReverseKlTerm:
    """Computes ``w max(-A r, -A clip(r, 1 - c, 1 + c))`` (arXiv 2603.07079, with a truncated
    importance weight).

    A = log q - log p_old + bonus, r = p / p_old, w = min(p_old / b, cap); A and w are constants. A
    token that the teacher finds e times as likely as the old policy does has A = 1: at p = p_old =
    b its loss is -1, with gradient -grad log p.
    """
    advantage = tokens.teacher_logprobs_T - tokens.old_logprobs_T
    if tokens.bonus_T is not None:
        advantage = advantage + tokens.bonus_T

    log_importance = tokens.old_logprobs_T - tokens.rollout_logprobs_T
    log_cap = math.log(form.importance_cap)
    importance = log_importance.clamp(max=log_cap).exp()
    ratio = (tokens.student_logprobs_T - tokens.old_logprobs_T).exp()
    free = -advantage * ratio
    clipped = -advantage * ratio.clamp(1.0 - form.clip, 1.0 + form.clip)

    return ReverseKlTerm(
        loss_T=importance * torch.maximum(free, clipped),
        importance_T=importance,
        capped_T=log_importance > log_cap,
        clipped_T=clipped > free,
    )


def reverse_kl(
    form: ReverseKl, tokens: SampledTokens, log_p: Tensor, log_q: Tensor
) -> ReverseKlTerm:
    """Computes the reverse KL of every token.

    Args:
        form: which form. Forms other than ``sampled`` have no advantage and no importance weight
            (it is reported as 1).
        tokens: the sampled tokens; only ``student_logprobs_T`` has gradients.
        log_p: student log-probabilities of the outcomes, [T, K + 1], as in ``forward_kl``.
        log_q: teacher log-probabilities of the outcomes, [T, K + 1].
    """
    if isinstance(form, SampledReverseKl):
        return sampled(form, tokens)

    zeros = torch.zeros_like(tokens.rollout_logprobs_T)

    match form:
        case TopkTailReverseKl():
            loss = divergence(log_p, log_q)
        case NoReverseKl():
            loss = zeros
        case _:
            assert_never(form)

    return ReverseKlTerm(
        loss_T=loss, importance_T=torch.ones_like(zeros), capped_T=zeros, clipped_T=zeros
    )
