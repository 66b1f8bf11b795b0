"""The objective, in the YAML shape of its three parts: a gate, a forward KL, a reverse KL.

Every form is chosen by ``kind`` and carries only its own options, so that an impossible pair cannot be written.
"""

from typing import Annotated, Literal

from pydantic import Field

from eopd.config.base import Section


class HardGate(Section):
    """g = 1 where the teacher's entropy is above ``tau`` nats (the paper)."""

    kind: Literal["hard"] = "hard"
    tau: float = Field(0.8, ge=0.0)


class AlwaysGate(Section):
    """g = 1 on every token."""

    kind: Literal["always"]


class NeverGate(Section):
    """g = 0 on every token: plain on-policy distillation."""

    kind: Literal["never"]


Gate = Annotated[HardGate | AlwaysGate | NeverGate, Field(discriminator="kind")]


class RenormalizedForwardKl(Section):
    """KL of the teacher renormalised on its top k to the student's full softmax (the paper)."""

    kind: Literal["renormalized"] = "renormalized"


class TailForwardKl(Section):
    """KL over k + 1 outcomes: the rest of the vocabulary is one bucket. The teacher is its minimum."""

    kind: Literal["tail"]


ForwardKl = Annotated[RenormalizedForwardKl | TailForwardKl, Field(discriminator="kind")]


class SampledReverseKl(Section):
    """Clipped policy gradient on the sampled token (the paper), with a truncated importance weight."""

    kind: Literal["sampled"] = "sampled"
    clip: float = Field(0.2, gt=0.0, lt=1.0)
    importance_cap: float = Field(2.0, ge=1.0)


class AlphaWarmup(Section):
    """alpha grows linearly from ``start`` x alpha to alpha over the first ``batches`` batches."""

    start: float = Field(1.0, ge=0.0, le=1.0)
    batches: int = Field(0, ge=0)


class LossConfig(Section):
    """L = w max(-A r, -A clip(r)) + alpha g FKL, per token, over all loss tokens of an optimiser step."""

    top_k: int = Field(16, ge=1, le=256)
    gate: Gate = HardGate()
    forward_kl: ForwardKl = RenormalizedForwardKl()
    reverse_kl: SampledReverseKl = SampledReverseKl()
    alpha: float = Field(1.0, ge=0.0)
    alpha_warmup: AlphaWarmup = AlphaWarmup()

    def alpha_at(self, batch: int) -> float:
        """Alpha of batch number ``batch``, counted from 0."""
        if batch >= self.alpha_warmup.batches:
            return self.alpha
        start = self.alpha_warmup.start
        return self.alpha * (start + (1.0 - start) * batch / self.alpha_warmup.batches)
