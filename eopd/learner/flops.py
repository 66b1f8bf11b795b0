"""What one rank's update costs: floating-point operations by a formula, memory as measured.

A token costs 6 FLOP for every weight it is multiplied with: 2 forward, 2 back to its input, 2 to
the weight's gradient, which a frozen weight (``student.lora``) does not have (Kaplan et al., arXiv
2001.08361, section 2.1). The head is multiplied with loss tokens alone, an expert with the tokens
that are sent to it. Attention costs 12 FLOP for every layer, dimension of all heads, and pair of a
token with one before it, half of all pairs (Chowdhery et al., arXiv 2204.02311, appendix B, for all
pairs). Counted is what the update needs, as in their model FLOPs utilisation. Left out: activations
computed again; the extra forward pass of several optimiser steps; that windows cut attention short.
"""

import resource
from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedModel

from eopd.metrics import Max, Mean, Metric
from eopd.types import Header


class Cost:
    """Measures what a model's updates cost on this rank.

    Args:
        model: what is trained.
        peak_flops: what this rank's device does in a second at best, where that is known.
    """

    def __init__(self, model: PreTrainedModel, peak_flops: float | None) -> None:
        self._flop = Flop(model)
        self._peak_flops = peak_flops

    def metrics(self, headers: Iterable[Header], seconds: float) -> dict[str, Metric]:
        """Returns the costs of an update on these trajectories that took so many seconds."""
        rate = sum(map(self._flop, headers)) / seconds
        metrics: dict[str, Metric] = {
            "eopd_learner_flops_per_second": Mean(rate, 1),
            "eopd_learner_memory_bytes": Max(float(_most_memory_bytes())),
        }
        if self._peak_flops is not None:
            metrics["eopd_learner_mfu_ratio"] = Mean(rate / self._peak_flops, 1)

        return metrics


class Flop:
    """Counts the FLOP of an update for a trajectory. An input embedding is looked up for free."""

    def __init__(self, model: PreTrainedModel) -> None:
        config: Any = model.config.get_text_config()
        head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
        experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
        active_share = config.num_experts_per_tok / experts if experts else 1.0
        self._body: float = sum(
            _flop_per_token(weight) * (active_share if ".experts." in name else 1.0)
            for name, weight in model.named_parameters()
            if weight is not head and weight is not embedding
        )
        self._head = _flop_per_token(head)
        dimensions = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        self._attention: int = (
            6 * config.num_hidden_layers * config.num_attention_heads * dimensions
        )

    def __call__(self, header: Header) -> float:  # noqa: D102
        length = header.num_tokens
        return (
            self._body * length + self._head * header.num_loss_tokens + self._attention * length**2
        )


def _flop_per_token(weight: torch.Tensor) -> int:
    return (6 if weight.requires_grad else 4) * _numel(weight)


def _numel(weight: torch.Tensor) -> int:
    """Returns the size of the whole weight, of which a rank holds a shard under ZeRO-3."""
    return int(weight.ds_numel) if hasattr(weight, "ds_numel") else weight.numel()


def _most_memory_bytes() -> int:
    """Returns the most bytes held so far: by tensors on a GPU, by the process without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
