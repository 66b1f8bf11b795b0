"""The student's output head, with all that a model family does between it and the logits."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


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
