"""What one rank's update costs: floating-point operations by a formula, memory as measured.

A token costs 6 FLOP for every weight it is multiplied with: 2 forward, 2 back to its input, 2 to the weight's gradient,
which a frozen weight (``student.lora``) does not have (Kaplan et al., arXiv 2001.08361, section 2.1). Counted is what
the update needs, as in model FLOPs utilisation (Chowdhery et al., arXiv 2204.02311, appendix B). Left out: attention
scores, small beside the rest at up to a few thousand tokens; activations computed again; the extra forward pass of
several optimiser steps. So the estimate is low.
"""

import resource

import torch
from transformers import PreTrainedModel

from eopd.telemetry.catalog import Row


class Cost:
    """Of a model's updates; ``peak_flops`` is what this rank's device does in a second at best, where that is known."""

    def __init__(self, model: PreTrainedModel, peak_flops: float | None) -> None:
        self._flop_per_token = flop_per_token(model)
        self._peak_flops = peak_flops

    def row(self, num_tokens: int, seconds: float) -> Row:
        """Of an update on ``num_tokens`` prompt and response tokens that took so long, on this rank."""
        rate = self._flop_per_token * num_tokens / seconds
        row = {"eopd_learner_flops_per_second": rate, "eopd_learner_memory_bytes": float(_most_memory_bytes())}
        return row if self._peak_flops is None else row | {"eopd_learner_mfu_ratio": rate / self._peak_flops}


def flop_per_token(model: PreTrainedModel) -> int:
    """FLOP of an update for a token. An input embedding is looked up, not multiplied, unless it is the head as well."""
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    multiplied = [weight for weight in model.parameters() if weight is head or weight is not embedding]
    return sum((6 if weight.requires_grad else 4) * _numel(weight) for weight in multiplied)


def _numel(weight: torch.Tensor) -> int:
    """Of the whole weight; under ZeRO-3 a rank holds a part."""
    return int(weight.ds_numel) if hasattr(weight, "ds_numel") else weight.numel()


def _most_memory_bytes() -> int:
    """The most that was held so far: by tensors on a GPU, by the process without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
