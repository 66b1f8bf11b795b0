"""The objective, in the YAML shape of its three parts: a gate, a forward KL, a reverse KL.

Every form is chosen by ``kind`` and carries only its own options, so that an impossible pair cannot
be written. The docstring of a form is the description of its ``kind``.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from eopd.config.base import (
    OWN_GRADERS,
    Count,
    FunctionName,
    GraderName,
    NativeOptions,
    Section,
)

Nats = Annotated[float, Field(ge=0.0, le=100.0)]  # an entropy; that of 2^32 even tokens is 22


class HardGate(Section):
    """The gate of the paper: g = 1 where the teacher's entropy is above ``tau``."""

    kind: Literal["hard"] = "hard"
    tau: Nats = 0.8
    """The entropy, in nats, above which the gate opens. A lower one opens it on more tokens."""


class QuantileGate(Section):
    """A gate at a fixed rate: g = 1 on the share ``top`` of the batch's loss tokens, those at which
    the teacher is least sure.
    """

    kind: Literal["quantile"] = "quantile"
    top: float = Field(0.2, gt=0.0, le=1.0)
    """The share of the batch's loss tokens on which the gate opens."""


class SigmoidGate(Section):
    """A gate that opens gradually with the teacher's entropy H: g = 1 / (1 + exp(-(H - tau) /
    scale)).
    """

    kind: Literal["sigmoid"] = "sigmoid"
    tau: Nats = 0.8
    """The entropy, in nats, at which the gate is half open."""

    scale: float = Field(0.1, ge=1e-4, le=100.0)
    """The width of the transition, in nats. The smaller it is, the closer the gate is to ``hard``."""


class RandomGate(Section):
    """The control at a matched rate: g = 1 on a share ``rate`` of the tokens, whatever the teacher
    says.
    """

    kind: Literal["random"] = "random"
    rate: float = Field(0.2, ge=0.0, le=1.0)
    """The probability with which the gate opens on a token."""


class AlwaysGate(Section):
    """The gate that is always open: g = 1 on every token."""

    kind: Literal["always"] = "always"


class NeverGate(Section):
    """The gate that never opens, which is plain on-policy distillation: g = 0 on every token."""

    kind: Literal["never"] = "never"


class CustomGate(Section):
    """A gate of your own: a function of the teacher's and the student's numbers of each token. The
    chapter docs/extending.md#your-own-functions says how it is written.
    """

    kind: Literal["custom"] = "custom"
    function: FunctionName
    """The import path of the function, ``package.module:name``."""

    options: NativeOptions = {}
    """Keyword arguments of the function. None are given by default."""


Gate = Annotated[
    HardGate | QuantileGate | SigmoidGate | RandomGate | AlwaysGate | NeverGate | CustomGate,
    Field(discriminator="kind"),
]


class RenormalizedForwardKl(Section):
    """The form of the paper: KL of the teacher, renormalised on its top k, to the student's full
    softmax.
    """

    kind: Literal["renormalized"] = "renormalized"


class TailForwardKl(Section):
    """KL over k + 1 outcomes, of which the rest of the vocabulary is one. The teacher is its
    minimum.
    """

    kind: Literal["tail"] = "tail"


class TruncatedForwardKl(Section):
    """A control: the top-k part of the full KL, neither renormalised nor completed. It is no KL
    and may be negative.
    """

    kind: Literal["truncated"] = "truncated"


ForwardKl = Annotated[
    RenormalizedForwardKl | TailForwardKl | TruncatedForwardKl, Field(discriminator="kind")
]


class Reward(Section):
    """The advantage of a reward, added to the teacher's on every token of a response: ``weight`` x
    (reward - mean reward of the prompt's other samples in the batch).

    It needs two or more samples of each prompt, and ``flow.lookahead`` 0.
    """

    function: GraderName
    """What rewards a response. ``exact`` and ``math`` give 1 to a correct answer and 0 to any other
    one: ``exact`` compares texts, ``math`` compares as mathematics, and both need answers in the
    data (docs/configuration.md#graders has the rules). A function of your own,
    ``package.module:name``, gives any number: docs/extending.md#your-own-functions.
    """

    weight: float = Field(1.0, gt=0.0, le=1e6)
    """The advantage, in nats, of a response whose reward is 1 above those of the others."""

    options: NativeOptions = {}
    """Keyword arguments of a function of your own. None are given by default."""

    @model_validator(mode="after")
    def _options_reach_a_function(self) -> Self:
        if self.is_ours and self.options:
            raise ValueError(f"options: go to a function of yours; {self.function} takes none")

        return self

    @property
    def is_ours(self) -> bool:
        """Whether the reward is one of ours, which grades answers."""
        return self.function in OWN_GRADERS


class SampledReverseKl(Section):
    """The form of the paper: a clipped policy gradient on the sampled token, with a truncated
    importance weight.
    """

    kind: Literal["sampled"] = "sampled"
    clip: float = Field(0.2, gt=0.0, lt=1.0)
    """The clip c of the policy gradient: the ratio of the student's probability to that at the start
    of the batch is cut at 1 - c and 1 + c. A smaller one lets a batch change less.
    """

    importance_cap: float = Field(2.0, ge=1.0, le=1e6)
    """The highest importance weight of a token. The weight corrects for a token that older weights
    wrote, and for the numeric gap between engine and learner.
    """

    reward: Reward | None = None
    """Adds the advantage of a reward to the teacher's. ``null`` learns from the teacher alone."""


class TopkTailReverseKl(Section):
    """The dense form: KL of the student to the teacher over the teacher's top k and the rest of
    the vocabulary as one outcome, without sampling noise.
    """

    kind: Literal["topk_tail"] = "topk_tail"


class NoReverseKl(Section):
    """No reverse KL: forward KL alone."""

    kind: Literal["none"] = "none"


ReverseKl = Annotated[
    SampledReverseKl | TopkTailReverseKl | NoReverseKl, Field(discriminator="kind")
]


class AlphaWarmup(Section):
    """A warm-up of alpha, which grows linearly from ``start`` x alpha to alpha."""

    start: float = Field(1.0, ge=0.0, le=1.0)
    """The share of alpha with which the first batch is trained."""

    batches: Count = 0
    """The number of batches over which alpha grows. 0 trains with all of alpha from the start."""


class LossConfig(Section):
    """The objective: L = RKL + alpha g FKL for each token, as a mean over all loss tokens of an
    optimiser step. The page docs/method.md explains its parts.
    """

    top_k: int = Field(16, ge=1, le=256)
    """The number k of the teacher's most likely tokens that every form of the loss reads, for each
    token.
    """

    gate: Gate = HardGate()
    """The gate g: on which tokens the forward KL comes on top."""

    forward_kl: ForwardKl = RenormalizedForwardKl()
    """The form of the forward KL, FKL."""

    reverse_kl: ReverseKl = SampledReverseKl()
    """The form of the reverse KL, RKL."""

    alpha: float = Field(1.0, ge=0.0, le=1e6)
    """The weight of the gated forward KL. 0 leaves it out."""

    alpha_warmup: AlphaWarmup = AlphaWarmup()
    """A warm-up of ``loss.alpha``; none by default."""

    @property
    def reward(self) -> Reward | None:
        """The reward's part, where the reverse KL has one."""
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
