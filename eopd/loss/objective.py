"""The objective of entropy-aware on-policy distillation (arXiv 2603.07079), as one pure function.

    L_t = RKL_t + alpha g_t FKL_t,    loss = sum of L_t over loss tokens / num_loss_tokens

The reverse KL stays on for every token; the gate g (``gate.py``) adds forward KL where the teacher
is unsure. ``num_loss_tokens`` counts *all* loss tokens of an optimiser step, over micro-batches and
ranks, gated or not: then the result does not depend on how the batch was cut.

Both KLs compare log p of the student with log q of the teacher over K + 1 outcomes [T, K + 1] of a
token: the teacher's K candidates and, last, the tail, which is the rest of the vocabulary. An
outcome at -inf on either side (the freed slot of a merged end token, the tail where K = V) is left
out. ``chunked.py`` makes log p of hidden states.
"""

import math
from dataclasses import dataclass, fields
from typing import Self, assert_never

import torch
from torch import Tensor

from eopd.config.loss import (
    ForwardKl,
    LossConfig,
    NoReverseKl,
    RenormalizedForwardKl,
    ReverseKl,
    SampledReverseKl,
    TailForwardKl,
    TopkTailReverseKl,
    TruncatedForwardKl,
)
from eopd.loss.chunked import Head, LogitChunks, LossTokens, Reading, chunked_sums
from eopd.metrics import Mean, Metric


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTerms:
    """Sums over loss tokens, float64 []: they add up over micro-batches. Means come last, from
    ``metrics``.

    ``reverse_kl`` is log p_old(y) - log q(y), ``logprob_gap`` |log p_old(y) - log b(y)|; nats,
    except for gates, shares and weights.
    """

    loss: Tensor
    reverse_kl: Tensor
    forward_kl: Tensor
    forward_kl_gated: Tensor  # weighted by the gate
    gate: Tensor
    teacher_entropy: Tensor
    student_entropy: Tensor
    teacher_topk_mass: Tensor
    student_topk_mass: Tensor
    topk_overlap: Tensor
    importance_weight: Tensor
    importance_capped: Tensor
    logprob_gap: Tensor
    clipped: Tensor

    def vector(self) -> Tensor:
        """Returns all terms in the order of the fields, float64 [N], to be added up at once."""
        return torch.stack([getattr(self, field.name).double() for field in fields(self)])

    @classmethod
    def from_vector(cls, vector_N: Tensor) -> Self:
        """Returns the terms of which ``vector`` made this vector."""
        names = (field.name for field in fields(cls))
        return cls(**dict(zip(names, vector_N.unbind(), strict=True)))

    def metrics(self, num_loss_tokens: int) -> dict[str, Metric]:
        """Returns means over the ``num_loss_tokens`` tokens of these sums, by catalogue name.

        Gated and ungated forward KL are means weighted by g and 1 - g: over the open and the closed
        tokens of a gate that is 0 or 1.
        """
        sums = dict(
            zip((field.name for field in fields(self)), self.vector().tolist(), strict=True)
        )
        mean = {name: Mean(value, num_loss_tokens) for name, value in sums.items()}
        ungated = Mean(
            sums["forward_kl"] - sums["forward_kl_gated"], num_loss_tokens - sums["gate"]
        )

        return {
            "eopd_loss": mean["loss"],
            "eopd_reverse_kl_nats": mean["reverse_kl"],
            "eopd_forward_kl_nats": mean["forward_kl"],
            "eopd_forward_kl_gated_nats": Mean(sums["forward_kl_gated"], sums["gate"]),
            "eopd_forward_kl_ungated_nats": ungated,
            "eopd_gate_ratio": mean["gate"],
            "eopd_teacher_entropy_nats": mean["teacher_entropy"],
            "eopd_student_entropy_nats": mean["student_entropy"],
            "eopd_teacher_topk_mass_ratio": mean["teacher_topk_mass"],
            "eopd_student_topk_mass_ratio": mean["student_topk_mass"],
            "eopd_topk_overlap_ratio": mean["topk_overlap"],
            "eopd_importance_weight_mean": mean["importance_weight"],
            "eopd_importance_capped_ratio": mean["importance_capped"],
            "eopd_logprob_gap_nats": mean["logprob_gap"],
            "eopd_clipped_ratio": mean["clipped"],
        }


def objective(
    hidden_TD: Tensor,
    head: Head,
    tokens: LossTokens,
    config: LossConfig,
    *,
    num_loss_tokens: int,
    alpha: float,
    chunk_tokens: int = 256,
) -> tuple[Tensor, LossTerms]:
    """Returns this micro-batch's share of the loss of an optimiser step, and sums for metrics.

    Logits are computed for loss rows only, ``chunk_tokens`` at a time, in float32 (float64 for
    float64 inputs). Hidden states and head may be in any floating dtype.

    Args:
        hidden_TD: the student's last hidden states; row t predicts ``tokens.target_ids_T[t]``.
        head: the student's, at the temperature that the rollouts were sampled at.
        tokens: what sampler and teacher gave.
        config: forms and options; ``config.alpha`` and the gate are already in ``alpha`` and
            ``tokens.gate_T``.
        num_loss_tokens: loss tokens of the whole optimiser step, over all micro-batches and ranks.
        alpha: weight of the forward KL in this batch.
        chunk_tokens: rows per chunk; the memory dial.

    Returns:
        The loss [], float32 (float64 for float64 inputs), to be summed over micro-batches and
        ranks, whose backward runs once and gives gradients (zeros where no row counts) to hidden
        states, head and bias; and this micro-batch's sums.

    Raises:
        ValueError: ``num_loss_tokens`` is below 1 though rows count.
    """
    if num_loss_tokens < 1 and bool(tokens.loss_mask_T.any()):
        raise ValueError(f"num_loss_tokens is {num_loss_tokens} for the whole step, and rows count")

    def measure(reading: Reading, chunk: LossTokens) -> Tensor:
        return _terms(reading, chunk, config, alpha).vector()

    loss, sums = chunked_sums(hidden_TD, head, tokens, measure, chunk_tokens)
    is_double = torch.float64 in (hidden_TD.dtype, head.weight_VD.dtype)
    dtype = torch.float64 if is_double else torch.float32
    return (loss / max(num_loss_tokens, 1)).to(dtype), LossTerms.from_vector(sums)


def token_statistics(
    hidden_TD: Tensor, head: Head, tokens: LossTokens, *, chunk_tokens: int = 256
) -> Tensor:
    """Compares student and teacher token by token, without gradient, in the arithmetic of
    ``objective`` and with its arguments.

    Returns:
        Float64 [7, T], 0 where masked. Of the token y its rows have, log-probabilities, KL and
        entropies in nats:

            log p(y), which is what ``old_logprobs_T`` is made of
            log p(y) - log q(y)
            the forward KL in its ``tail`` form
            the student's entropy
            the teacher's entropy
            1 where student and teacher have the same most likely token
            1
    """
    columns = torch.zeros((7, len(hidden_TD)), dtype=torch.float64, device=hidden_TD.device)

    with torch.no_grad(), torch.autocast(hidden_TD.device.type, enabled=False):
        for chunk in LogitChunks(hidden_TD, head, tokens, chunk_tokens):
            columns[:, chunk.rows_C] = _statistics(chunk.reading, chunk.tokens)

    return columns


def _statistics(reading: Reading, tokens: LossTokens) -> Tensor:
    """Returns the rows of ``token_statistics`` for C tokens, float64 [7, C]."""
    logprobs, log_p = reading.student_logprobs(), reading.student_outcomes()
    teacher_top = tokens.teacher_topk_logprobs_TK.argmax(-1, keepdim=True)
    agrees = reading.topk_logits_CK.gather(1, teacher_top).squeeze(1) >= reading.top_logits_C

    return torch.stack(
        [
            logprobs,
            logprobs - tokens.teacher_logprobs_T.double(),
            _divergence(tokens.teacher_outcomes(), log_p),
            reading.student_entropy(log_p),
            tokens.teacher_entropy_T.double(),
            agrees.double(),
            tokens.loss_mask_T.double(),
        ]
    )


def _terms(reading: Reading, tokens: LossTokens, config: LossConfig, alpha: float) -> LossTerms:
    """Returns the sums over one chunk; ``loss`` has gradients."""
    student_logprobs = reading.student_logprobs()
    current = student_logprobs.detach()
    sampled = SampledTokens(
        student_logprobs_T=student_logprobs,
        old_logprobs_T=current if tokens.old_logprobs_T is None else tokens.old_logprobs_T.double(),
        rollout_logprobs_T=tokens.rollout_logprobs_T.double(),
        teacher_logprobs_T=tokens.teacher_logprobs_T.double(),
        bonus_T=tokens.advantage_bonus_T,
    )
    log_p, log_q = reading.student_outcomes(), tokens.teacher_outcomes()
    reverse = reverse_kl(config.reverse_kl, sampled, log_p, log_q)
    forward, gate = forward_kl(config.forward_kl, log_p, log_q), tokens.gate_T.double()

    return LossTerms(
        loss=(reverse.loss_T + alpha * gate * forward).sum(),
        reverse_kl=(sampled.old_logprobs_T - sampled.teacher_logprobs_T).sum(),
        forward_kl=forward.detach().sum(),
        forward_kl_gated=(gate * forward.detach()).sum(),
        gate=gate.sum(),
        teacher_entropy=tokens.teacher_entropy_T.double().sum(),
        student_entropy=reading.student_entropy(log_p.detach()).sum(),
        teacher_topk_mass=log_q[:, :-1].exp().sum(),
        student_topk_mass=log_p[:, :-1].detach().exp().sum(),
        topk_overlap=reading.topk_overlap_C.sum(),
        importance_weight=reverse.importance_T.sum(),
        importance_capped=reverse.capped_T.double().sum(),
        logprob_gap=(sampled.old_logprobs_T - sampled.rollout_logprobs_T).abs().sum(),
        clipped=reverse.clipped_T.double().sum(),
    )


def forward_kl(form: ForwardKl, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Computes the forward KL of every token, from teacher to student: sum q log(q / p).

    ``renormalized`` is KL(q~ || p), q~ the teacher renormalised on its candidates, p not: never
    negative (arXiv 2603.07079). The teacher itself is no minimum of it: the gradient drives the
    student's whole mass into the candidates.

    ``tail`` is the KL over the K + 1 outcomes: 0 where student and teacher agree on all of them,
    otherwise positive. This holds up to rounding: a float32 teacher's outcomes add up to 1 only
    nearly, which may make it negative by as much.

    ``truncated`` has the candidates' terms of the full KL alone: it is no KL, and negative where
    the student has more mass on the candidates than the teacher.

    Args:
        form: which form.
        log_p: student log-probabilities of the outcomes, [T, K + 1].
        log_q: teacher log-probabilities of the outcomes, [T, K + 1].

    Returns:
        [T], nats; differentiable in ``log_p``.
    """
    candidates_p, candidates_q = log_p[..., :-1], log_q[..., :-1]

    match form:
        case RenormalizedForwardKl():
            log_mass = candidates_q.logsumexp(-1, keepdim=True)
            return _divergence(candidates_q - log_mass, candidates_p)
        case TailForwardKl():
            return _divergence(log_q, log_p)
        case TruncatedForwardKl():
            return _divergence(candidates_q, candidates_p)
        case _:
            assert_never(form)


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


def reverse_kl(
    form: ReverseKl, tokens: SampledTokens, log_p: Tensor, log_q: Tensor
) -> ReverseKlTerm:
    """Computes the reverse KL of every token, from student to teacher: sum p log(p / q).

    ``sampled`` is a clipped policy gradient on the sampled token, whose advantage is
    log q - log p_old: its expected gradient is that of KL(p || q). (Back-propagating the mean of
    log p - log q itself would be wrong: that gradient does not know the teacher.) ``topk_tail`` is
    the KL itself, over the K + 1 outcomes, and ``none`` leaves it out: they have no advantage and
    no importance weight, which is reported as 1.

    Args:
        form: which form.
        tokens: the sampled tokens; only ``student_logprobs_T`` has gradients.
        log_p: student log-probabilities of the outcomes, [T, K + 1].
        log_q: teacher log-probabilities of the outcomes, [T, K + 1].

    Returns:
        The loss in nats, and what is reported of it.
    """
    match form:
        case SampledReverseKl():
            return _sampled(form, tokens)
        case TopkTailReverseKl():
            loss = _divergence(log_p, log_q)
        case NoReverseKl():
            loss = torch.zeros_like(tokens.rollout_logprobs_T)
        case _:
            assert_never(form)

    zeros = torch.zeros_like(loss)
    return ReverseKlTerm(
        loss_T=loss, importance_T=torch.ones_like(loss), capped_T=zeros, clipped_T=zeros
    )


def _sampled(form: SampledReverseKl, tokens: SampledTokens) -> ReverseKlTerm:
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


def _divergence(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Returns ``sum a log(a / b)`` over the last axis, in nats.

    Outcomes at -inf on either side count 0 and get no gradient.
    """
    impossible = log_a.isinf() | log_b.isinf()
    # Masked before the product: 0 x inf would be NaN in value or gradient.
    log_a, log_b = log_a.masked_fill(impossible, 0.0), log_b.masked_fill(impossible, 0.0)
    return (log_a.exp() * (log_a - log_b)).sum(-1)
