"""What the objective is given besides the student's hidden states: its output head, and what sampler and
teacher gave of every token.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from eopd.loss.forward_kl import outcomes


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The map from hidden states to the logits of a policy over V tokens:

        softcap(hidden_TD @ weight_VD^T * logit_scale + bias_V) / temperature

    The weight may be tied, and in any floating dtype.
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    logit_scale: float = 1.0  # Cohere, Granite
    logit_softcap: float | None = None  # c of c tanh(x / c) (Gemma)
    temperature: float = 1.0  # the one that tokens are sampled at

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Returns dense logits [T, V], for a few tokens; ``chunked.py`` is for many."""
        logits_TV = functional.linear(hidden_TD, self.weight_VD) * self.logit_scale
        if self.bias_V is not None:
            logits_TV = logits_TV + self.bias_V

        if self.logit_softcap is not None:
            logits_TV = self.logit_softcap * torch.tanh(logits_TV / self.logit_softcap)

        return logits_TV / self.temperature


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
