"""Low-rank adapters, between the learner that trains them and the engines that answer with them.

    learner                  the wire            engine
    A, B of a layer   ────▶  A, B         ────▶  W + scale B A, with W from its own copy of the model

    1.7 billion weights      17 million numbers at rank 16 (Qwen3-1.7B, all linear layers)

An engine keeps no adapters: what it computes with is merged, so that its steps cost what they cost
without adapters.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

WEIGHT, LORA_A, LORA_B = ".weight", ".lora_A.weight", ".lora_B.weight"  # behind a layer's name
_ROWS = 1024


@dataclass(frozen=True, slots=True)
class CheckpointTensor:
    """How a tensor that leaves the learner is made of parameters.

    The first of them has the tensor's shape and dtype.
    """

    parts: tuple[Tensor, ...]
    make: Callable[..., Tensor] = Tensor.detach

    def whole(self) -> Tensor:
        """Returns the tensor: a parameter itself where it is the only part. Under ZeRO-3 all parts
        must be gathered.
        """
        return self.make(*self.parts)


@torch.no_grad()
def merge(weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor, *, scale: float) -> Tensor:
    """Returns ``weight + scale b a``, computed in float32, in the weight's dtype.

    Some rows at a time, since engines leave little memory of a GPU free.
    """
    made_OI = torch.empty_like(weight_OI)
    parts = (torch.split(tensor, _ROWS) for tensor in (made_OI, weight_OI, b_OR))
    for made, weight, b in zip(*parts, strict=True):
        made.copy_(torch.addmm(weight.float(), b.float(), a_RI.float(), alpha=scale))

    return made_OI


def merged(
    weights: Iterable[tuple[str, Tensor]],
    adapters: Mapping[str, Tensor],
    *,
    scale: float,
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[tuple[str, Tensor]]:
    """Yields weights by name as the learner has them: cast, and merged with their adapters.

    Args:
        weights: those of the model that was adapted, as its files hold them, in floating point.
        adapters: for each adapted layer a matrix ``LAYER.lora_A.weight`` [rank, in] and
            ``LAYER.lora_B.weight`` [out, rank].
        scale: ``alpha / rank``.
        dtype: what the learner has cast its weights to before it adapted them.
        device: where to merge.

    Raises:
        ValueError: there is no weight for an adapter. All others were yielded by then.
    """
    left = {name.removesuffix(LORA_A) for name in adapters if name.endswith(LORA_A)}
    for name, weight in weights:
        layer = name.removesuffix(WEIGHT)
        if layer not in left:
            yield name, weight.to(dtype)
            continue

        left.remove(layer)
        a_RI, b_OR = (adapters[layer + part].to(device) for part in (LORA_A, LORA_B))
        yield name, merge(weight.to(device, dtype), a_RI, b_OR, scale=scale)

    if left:
        raise ValueError(f"the model's files hold no {min(left)}{WEIGHT}, which has an adapter")
