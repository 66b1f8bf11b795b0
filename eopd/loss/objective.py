"""The objective of entropy-aware on-policy distillation (arXiv 2603.07079), as one pure function.

    L_t = RKL_t + alpha g_t FKL_t,    loss = sum of L_t over loss tokens / num_loss_tokens

The reverse KL stays on for every token; the gate g adds forward KL where the teacher is unsure.
``num_loss_tokens`` counts *all* loss tokens of an optimiser step, over micro-batches and ranks,
gated or not: then the result does not depend on how the batch was cut.
"""

from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from eopd.config.loss import LossConfig
from eopd.loss.chunked import chunked_sums
from eopd.loss.forward_kl import forward_kl
from eopd.loss.inputs import Head, LossTokens
from eopd.loss.logits import Reading
from eopd.loss.reverse_kl import SampledTokens, reverse_kl
from eopd.metrics import Mean, Metric

__all__ = ["LossTerms", "LossTokens", "objective"]


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


def _terms(reading: Reading, tokens: LossTokens, config: LossConfig, alpha: float) -> LossTerms:
    """Returns the sums over one chunk; ``loss`` has gradients."""
    student_logprobs, teacher_logprobs = (
        reading.student_logprobs(),
        tokens.teacher_logprobs_T.double(),
    )
    current = student_logprobs.detach()
    sampled = SampledTokens(
        student_logprobs_T=student_logprobs,
        old_logprobs_T=current if tokens.old_logprobs_T is None else tokens.old_logprobs_T.double(),
        rollout_logprobs_T=tokens.rollout_logprobs_T.double(),
        teacher_logprobs_T=teacher_logprobs,
        bonus_T=tokens.advantage_bonus_T,
    )
    log_p, log_q = reading.student_outcomes(), tokens.teacher_outcomes()
    reverse = reverse_kl(config.reverse_kl, sampled, log_p, log_q)
    forward, gate = forward_kl(config.forward_kl, log_p, log_q), tokens.gate_T.double()
    entropy = (
        torch.zeros_like(gate) if tokens.teacher_entropy_T is None else tokens.teacher_entropy_T
    )

    return LossTerms(
        loss=(reverse.loss_T + alpha * gate * forward).sum(),
        reverse_kl=(sampled.old_logprobs_T - teacher_logprobs).sum(),
        forward_kl=forward.detach().sum(),
        forward_kl_gated=(gate * forward.detach()).sum(),
        gate=gate.sum(),
        teacher_entropy=entropy.double().sum(),
        student_entropy=reading.student_entropy(log_p.detach()).sum(),
        teacher_topk_mass=log_q[:, :-1].exp().sum(),
        student_topk_mass=log_p[:, :-1].detach().exp().sum(),
        topk_overlap=reading.topk_overlap_C.sum(),
        importance_weight=reverse.importance_T.sum(),
        importance_capped=reverse.capped_T.double().sum(),
        logprob_gap=(sampled.old_logprobs_T - sampled.rollout_logprobs_T).abs().sum(),
        clipped=reverse.clipped_T.double().sum(),
    )
