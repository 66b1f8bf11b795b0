"""The learner's parameters as checkpoint tensors, whatever the ZeRO stage.

Under ZeRO-1 and 2 rank 0 has all weights; under ZeRO-3 a bucket is gathered by all ranks together
and copied out on rank 0, so that nothing is transmitted while parameters are held. What a
checkpoint tensor is made of (itself, or with LoRA a weight and its adapter) is the learner's
business. Checked against DeepSpeed 0.19.8.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import deepspeed
import torch

from eopd.weights.layout import Bucket, ParameterMeta


class Recipe(Protocol):
    """A checkpoint tensor (``learner/lora.py``)."""

    @property
    def parts(self) -> tuple[torch.Tensor, ...]:
        """The parameters it is made of; the first has its dtype and shape."""
        ...

    def whole(self) -> torch.Tensor:
        """The tensor, while all parts are whole."""
        ...


class ModelSource:
    """A ``ParameterSource`` over a model that DeepSpeed may have sharded; of its buffers,
    which never change, none.
    """

    def __init__(self, tensors: Mapping[str, Recipe], *, rank: int, zero_stage: int) -> None:
        self._recipes = {
            n: recipe
            for n, recipe in tensors.items()
            if isinstance(recipe.parts[0], torch.nn.Parameter)
        }
        self._rank = rank
        self._sharded = zero_stage == 3

    def metadata(self) -> Sequence[ParameterMeta]:
        """Full shapes, also where ZeRO-3 has emptied the tensor."""
        firsts = {name: recipe.parts[0] for name, recipe in self._recipes.items()}
        return [
            ParameterMeta.of(name, tensor, tensor.ds_shape if self._sharded else tensor.shape)  # type: ignore[attr-defined]
            for name, tensor in firsts.items()
        ]

    def gather(self, bucket: Bucket) -> Sequence[torch.Tensor] | None:
        """Full tensors on rank 0; all ranks must call this in the same order."""
        recipes = [self._recipes[parameter.name] for parameter in bucket]
        if not self._sharded:
            return [recipe.whole() for recipe in recipes] if self._rank == 0 else None

        with deepspeed.zero.GatheredParameters(
            [part for recipe in recipes for part in recipe.parts]
        ):
            return [recipe.whole().clone() for recipe in recipes] if self._rank == 0 else None
