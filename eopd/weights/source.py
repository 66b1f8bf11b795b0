"""The learner's parameters as checkpoint tensors, however they are sharded.

All ranks gather a bucket together. Where parameters are sharded, rank 0 has copies of them afterwards,
so that nothing is sent while they are gathered. The learner knows what a checkpoint tensor is made of
(a parameter, or with LoRA a weight and its adapter), and how its parameters are sharded.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch

from eopd.adapters import CheckpointTensor
from eopd.weights.layout import Bucket, ParameterMeta


class ModelSource:
    """A ``ParameterSource`` over a model's parameters, without its buffers, which never change.

    Args:
        tensors: the checkpoint's tensors, by name; or those of its adapters alone.
        rank: of this process; 0 sends.
        shape: gives the full shape of a parameter (``Backend.shape``).
        gathered: makes parameters whole in a block (``Backend.gathered``).
        scale: with which adapters are merged that are sent alone; None where weights are sent.
    """

    def __init__(
        self,
        tensors: Mapping[str, CheckpointTensor],
        *,
        rank: int,
        shape: Callable[[torch.Tensor], Sequence[int]],
        gathered: Callable[[Sequence[torch.Tensor]], AbstractContextManager[bool]],
        scale: float | None = None,
    ) -> None:
        self.scale = scale
        self._recipes = {
            name: recipe
            for name, recipe in tensors.items()
            if isinstance(recipe.parts[0], torch.nn.Parameter)
        }
        self._rank = rank
        self._shape = shape
        self._gathered = gathered

    def metadata(self) -> Sequence[ParameterMeta]:
        """Returns full shapes, also where a tensor is empty because it is sharded."""
        firsts = {name: recipe.parts[0] for name, recipe in self._recipes.items()}
        return [
            ParameterMeta.of(name, tensor, self._shape(tensor)) for name, tensor in firsts.items()
        ]

    def gather(self, bucket: Bucket) -> Sequence[torch.Tensor] | None:
        """Returns full tensors on rank 0; all ranks must call this in the same order."""
        recipes = [self._recipes[parameter.name] for parameter in bucket]
        with self._gathered([part for recipe in recipes for part in recipe.parts]) as are_copies:
            if self._rank != 0:
                return None

            whole = [recipe.whole() for recipe in recipes]
            return [tensor.clone() for tensor in whole] if are_copies else whole
