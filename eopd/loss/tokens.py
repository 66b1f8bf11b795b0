"""What the loss is given of every token besides the student's hidden states."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Self

from torch import Tensor

from eopd.loss.forward_kl import outcomes


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTokens:
    """What sampler and teacher gave for T packed tokens. Row t of the hidden states predicts
    ``target_ids_T[t]``.

    Rows where ``loss_mask_T`` is False are never read: they may hold anything. Log-probabilities
    and entropies are in nats. A candidate at -inf is ignored, whatever its id: it is the freed slot
    of a merged end token.
    """

    target_ids_T: Tensor  # int
    loss_mask_T: Tensor  # bool
    rollout_logprobs_T: Tensor  # of the weights that sampled the token
    # of the student at the start of the batch; None: that is the student now
    old_logprobs_T: Tensor | None = None
    gate_T: Tensor  # in [0, 1]
    teacher_logprobs_T: Tensor
    teacher_topk_ids_TK: Tensor  # int, distinct in a row
    teacher_topk_logprobs_TK: Tensor
    teacher_tail_logprobs_T: Tensor  # log of the mass outside the top k; -inf where k = V
    advantage_bonus_T: Tensor | None = None
    teacher_entropy_T: Tensor | None = None  # a diagnostic only

    def columns(self) -> dict[str, Tensor]:
        """Returns all columns that are there, by name."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: column for name, column in columns.items() if column is not None}

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Returns the same tokens with a function applied to every column."""
        return replace(self, **{name: function(value) for name, value in self.columns().items()})

    def teacher_outcomes(self) -> Tensor:
        """Returns log-probabilities of the candidates and the rest, float64 [T, K + 1]."""
        return outcomes(
            self.teacher_topk_logprobs_TK.double(), self.teacher_tail_logprobs_T.double()
        )
