"""The learner's parameters as checkpoint tensors, however they are sharded.

A bucket is gathered by all ranks together and copied out on rank 0, so that nothing is transmitted
while parameters are held. What a checkpoint tensor is made of (itself, or with LoRA a weight and its
adapter) is the learner's business, and so is how it is sharded: this is handed functions.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

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
    """A ``ParameterSource`` over a model's parameters; of its buffers, which never change, none.

    Args:
        tensors: what leaves the learner, by name.
        rank: of this process; 0 sends.
        shape: the full shape of a parameter (``learner/backend.py``).
        gathered: makes parameters whole; see there.
    """

    def __init__(
        self,
        tensors: Mapping[str, Recipe],
        *,
        rank: int,
        shape: Callable[[torch.Tensor], Sequence[int]],
        gathered: Callable[[Sequence[torch.Tensor]], AbstractContextManager[bool]],
    ) -> None:
        self._recipes = {
            name: recipe
            for name, recipe in tensors.items()
            if isinstance(recipe.parts[0], torch.nn.Parameter)
        }
        self._rank = rank
        self._shape = shape
        self._gathered = gathered

    def metadata(self) -> Sequence[ParameterMeta]:
        """Full shapes, also where a tensor is empty because it is sharded."""
        firsts = {name: recipe.parts[0] for name, recipe in self._recipes.items()}
        return [
            ParameterMeta.of(name, tensor, self._shape(tensor)) for name, tensor in firsts.items()
        ]

    def gather(self, bucket: Bucket) -> Sequence[torch.Tensor] | None:
        """Full tensors on rank 0; all ranks must call this in the same order."""
        recipes = [self._recipes[parameter.name] for parameter in bucket]
        with self._gathered([part for recipe in recipes for part in recipe.parts]) as are_copies:
            if self._rank != 0:
                return None

            whole = [recipe.whole() for recipe in recipes]
            return [tensor.clone() for tensor in whole] if are_copies else whole
