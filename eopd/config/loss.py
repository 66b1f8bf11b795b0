"""The objective, in the YAML shape of its three parts: a gate, a forward KL, a reverse KL.

Every form is chosen by ``kind`` and carries only its own options, so that an impossible pair cannot
be written.
"""

from typing import Annotated, Literal

from pydantic import Field

from eopd.config.base import Count, Section

GraderName = Literal["exact", "math"]
Nats = Annotated[float, Field(ge=0.0, le=100.0)]  # an entropy; that of 2^32 even tokens is 22


class HardGate(Section):
    """g = 1 where the teacher's entropy is above ``tau`` nats (the paper)."""

    kind: Literal["hard"] = "hard"
    tau: Nats = 0.8


class QuantileGate(Section):
    """g = 1 on the share ``top`` of the batch's loss tokens at which the teacher is least sure."""

    kind: Literal["quantile"] = "quantile"
    top: float = Field(0.2, gt=0.0, le=1.0)


class SigmoidGate(Section):
    """g = 1 / (1 + exp(-(H - tau) / scale)); ``tau`` and ``scale`` in nats."""

    kind: Literal["sigmoid"] = "sigmoid"
    tau: Nats = 0.8
    scale: float = Field(0.1, ge=1e-4, le=100.0)


class RandomGate(Section):
    """g = 1 on a share ``rate`` of the tokens, whatever the teacher says: the control at a
    matched rate.
    """

    kind: Literal["random"] = "random"
    rate: float = Field(0.2, ge=0.0, le=1.0)


class AlwaysGate(Section):
    """g = 1 on every token."""

    kind: Literal["always"] = "always"


class NeverGate(Section):
    """g = 0 on every token: plain on-policy distillation."""

    kind: Literal["never"] = "never"


Gate = Annotated[
    HardGate | QuantileGate | SigmoidGate | RandomGate | AlwaysGate | NeverGate,
    Field(discriminator="kind"),
]


class RenormalizedForwardKl(Section):
    """KL of the teacher renormalised on its top k to the student's full softmax (the paper)."""

    kind: Literal["renormalized"] = "renormalized"


class TailForwardKl(Section):
    """KL over k + 1 outcomes: the rest of the vocabulary is one bucket. The teacher is its
    minimum.
    """

    kind: Literal["tail"] = "tail"


class TruncatedForwardKl(Section):
    """The top-k part of the full KL, neither renormalised nor completed: no KL, may be
    negative; a control.
    """

    kind: Literal["truncated"] = "truncated"


ForwardKl = Annotated[
    RenormalizedForwardKl | TailForwardKl | TruncatedForwardKl, Field(discriminator="kind")
]


class Reward(Section):
    """A verifier's advantage, added to the teacher's on every token of a response.

    ``weight`` (nats) x (reward - mean reward of the prompt's other samples); the reward is 1 where
    ``grader`` finds the answer correct, else 0.
    """

    grader: GraderName
    weight: float = Field(1.0, gt=0.0, le=1e6)


class SampledReverseKl(Section):
    """Clipped policy gradient on the sampled token (the paper), with a truncated importance
    weight.
    """

    kind: Literal["sampled"] = "sampled"
    clip: float = Field(0.2, gt=0.0, lt=1.0)
    importance_cap: float = Field(2.0, ge=1.0, le=1e6)
    reward: Reward | None = None


class TopkTailReverseKl(Section):
    """KL of the student to the teacher over the teacher's top k and the rest as one bucket:
    no sampling noise.
    """

    kind: Literal["topk_tail"] = "topk_tail"


class NoReverseKl(Section):
    """Forward KL alone."""

    kind: Literal["none"] = "none"


ReverseKl = Annotated[
    SampledReverseKl | TopkTailReverseKl | NoReverseKl, Field(discriminator="kind")
]


class AlphaWarmup(Section):
    """alpha grows linearly from ``start`` x alpha to alpha over the first ``batches`` batches."""

    start: float = Field(1.0, ge=0.0, le=1.0)
    batches: Count = 0


class LossConfig(Section):
    """Per token L = RKL + alpha g FKL, a mean over all loss tokens of an optimiser step.

    ``top_k`` is the number of teacher candidates, for every form.
    """

    top_k: int = Field(16, ge=1, le=256)
    gate: Gate = HardGate()
    forward_kl: ForwardKl = RenormalizedForwardKl()
    reverse_kl: ReverseKl = SampledReverseKl()
    alpha: float = Field(1.0, ge=0.0, le=1e6)
    alpha_warmup: AlphaWarmup = AlphaWarmup()

    @property
    def reward(self) -> Reward | None:
        """The verifier's part, where the reverse KL has one."""
        return self.reverse_kl.reward if isinstance(self.reverse_kl, SampledReverseKl) else None

    @property
    def forward_counts(self) -> bool:
        """Whether the forward KL has any weight: alpha is not 0, and the gate can open."""
        gate = self.gate
        shut = isinstance(gate, NeverGate) or (isinstance(gate, RandomGate) and gate.rate == 0.0)
        return self.alpha > 0.0 and not shut

    def alpha_at(self, batch: int) -> float:
        """Alpha of batch number ``batch``, counted from 0."""
        if batch >= self.alpha_warmup.batches:
            return self.alpha

        start = self.alpha_warmup.start
        return self.alpha * (start + (1.0 - start) * batch / self.alpha_warmup.batches)
