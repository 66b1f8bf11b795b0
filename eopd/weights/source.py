"""The learner's parameters as checkpoint tensors, whatever the ZeRO stage.

Under ZeRO-1 and 2 rank 0 has all weights; under ZeRO-3 a bucket is gathered by all ranks together and copied out on
rank 0, so that nothing is transmitted while parameters are held. What a checkpoint tensor is made of (itself, or with
LoRA a weight and its adapter) is the learner's business, and so is how a checkpoint stores it: a mixture's experts are
one tensor in the learner, and one tensor each in a checkpoint. Checked against DeepSpeed 0.19.8.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
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


# From a tensor by the learner's name to the tensors of a checkpoint, by theirs; also on the meta device.
AsStored = Callable[[str, torch.Tensor], Mapping[str, torch.Tensor]]


def _as_it_is(name: str, tensor: torch.Tensor) -> Mapping[str, torch.Tensor]:
    return {name: tensor}


class ModelSource:
    """A ``ParameterSource`` over a model that DeepSpeed may have sharded; of its buffers, which never change, none.

    Args:
        tensors: by the learner's names.
        rank: of this process.
        zero_stage: under 3 tensors are gathered.
        as_stored: how a checkpoint stores each (``learner/stored.py``).
    """

    def __init__(
        self, tensors: Mapping[str, Recipe], *, rank: int, zero_stage: int, as_stored: AsStored = _as_it_is
    ) -> None:
        self._recipes = {n: recipe for n, recipe in tensors.items() if isinstance(recipe.parts[0], torch.nn.Parameter)}
        self._rank = rank
        self._sharded = zero_stage == 3
        self._as_stored = as_stored
        self._metadata: list[ParameterMeta] = []
        self._origin: dict[str, str] = {}  # from the name in a checkpoint to the learner's
        for name, recipe in self._recipes.items():
            first = recipe.parts[0]
            shape = first.ds_shape if self._sharded else first.shape  # type: ignore[attr-defined]
            for stored, tensor in as_stored(name, torch.empty(shape, dtype=first.dtype, device="meta")).items():
                self._metadata.append(ParameterMeta.of(stored, tensor, tensor.shape))
                self._origin[stored] = name

    def metadata(self) -> Sequence[ParameterMeta]:
        """Full shapes, also where ZeRO-3 has emptied the tensor."""
        return self._metadata

    def gather(self, bucket: Bucket) -> Sequence[torch.Tensor] | None:
        """Full tensors on rank 0; all ranks must call this in the same order."""
        origins = dict.fromkeys(self._origin[parameter.name] for parameter in bucket)
        if not self._sharded:
            return self._stored(origins, bucket) if self._rank == 0 else None
        with deepspeed.zero.GatheredParameters([part for name in origins for part in self._recipes[name].parts]):
            return [tensor.clone() for tensor in self._stored(origins, bucket)] if self._rank == 0 else None

    def _stored(self, origins: Iterable[str], bucket: Bucket) -> Sequence[torch.Tensor]:
        stored: dict[str, torch.Tensor] = {}
        for name in origins:
            stored |= self._as_stored(name, self._recipes[name].whole())
        return [stored[parameter.name] for parameter in bucket]
