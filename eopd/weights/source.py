"""The learner's parameters as checkpoint tensors, whatever the ZeRO stage.

Under ZeRO-1 and 2 rank 0 has all weights; under ZeRO-3 a bucket is gathered by all ranks together and copied out on
rank 0, so that nothing is transmitted while parameters are held. Checked against DeepSpeed 0.19.8.
"""

from collections.abc import Sequence

import deepspeed
import torch

from eopd.weights.layout import Bucket, ParameterMeta


class ModelSource:
    """A ``ParameterSource`` over a Hugging Face module that DeepSpeed may have sharded. Tied parameters appear once."""

    def __init__(self, module: torch.nn.Module, *, rank: int, zero_stage: int) -> None:
        self._parameters = dict(module.named_parameters())
        self._rank = rank
        self._sharded = zero_stage == 3

    def metadata(self) -> Sequence[ParameterMeta]:
        """Full shapes, also where ZeRO-3 has emptied the tensor."""
        return [
            ParameterMeta.of(name, tensor, tensor.ds_shape if self._sharded else tensor.shape)  # type: ignore[attr-defined]
            for name, tensor in self._parameters.items()
        ]

    def gather(self, bucket: Bucket) -> Sequence[torch.Tensor] | None:
        """Full tensors on rank 0; all ranks must call this in the same order."""
        tensors = [self._parameters[parameter.name] for parameter in bucket]
        if not self._sharded:
            return tensors if self._rank == 0 else None
        with deepspeed.zero.GatheredParameters(tensors):
            return [tensor.detach().clone() for tensor in tensors] if self._rank == 0 else None
