"""The learner's parameters, and how they are laid into buckets: the sender cuts, and tells the
receivers what is where.

A bucket travels as one message: its bytes, and the hash of its bytes behind them.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Self

import torch
import xxhash

from eopd.adapters import CheckpointTensor
from eopd.types import WeightTransferError

# xxh3_128 finds accidents, not attackers, at 28 GB/s a core; sha256, the next best of hashlib, at
# 1.8 (measured).
DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class ParameterMeta:
    """Name, dtype and full shape of one parameter, as a checkpoint holds it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """The parameter's bytes on the wire."""
        return math.prod(self.shape) * self.torch_dtype.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch knows it."""
        dtype = getattr(torch, self.dtype)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"parameter {self.name}: {self.dtype} is no torch dtype")

        return dtype

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor, shape: Sequence[int]) -> Self:
        """Describe a tensor; ``shape`` is the full one (under ZeRO-3 the tensor itself is
        empty).
        """
        return cls(name, str(tensor.dtype).removeprefix("torch."), tuple(shape))


Bucket = tuple[ParameterMeta, ...]


def cut_into_buckets(parameters: Sequence[ParameterMeta], bucket_bytes: int) -> tuple[Bucket, ...]:
    """Fill buckets in order up to ``bucket_bytes``; a parameter larger than that gets a
    bucket of its own.
    """
    buckets: list[list[ParameterMeta]] = [[]]
    filled = 0

    for parameter in parameters:
        if buckets[-1] and filled + parameter.num_bytes > bucket_bytes:
            buckets.append([])
            filled = 0

        buckets[-1].append(parameter)
        filled += parameter.num_bytes

    return tuple(tuple(bucket) for bucket in buckets if bucket)


def bucket_num_bytes(bucket: Bucket) -> int:
    """Returns the bytes of a bucket on the wire, without its hash."""
    return sum(parameter.num_bytes for parameter in bucket)


class ModelSource:
    """A model's parameters as checkpoint tensors, however they are sharded; without its buffers, which
    never change.

    All ranks gather a bucket together. Where parameters are sharded, rank 0 has copies of them
    afterwards, so that nothing is sent while they are gathered.

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
        return [
            ParameterMeta.of(name, recipe.parts[0], self._shape(recipe.parts[0]))
            for name, recipe in self._recipes.items()
        ]

    def gather(self, bucket: Bucket) -> Sequence[torch.Tensor] | None:
        """Returns full tensors on rank 0; all ranks must call this in the same order."""
        recipes = [self._recipes[parameter.name] for parameter in bucket]
        with self._gathered([part for recipe in recipes for part in recipe.parts]) as are_copies:
            if self._rank != 0:
                return None

            whole = [recipe.whole() for recipe in recipes]
            return [tensor.clone() for tensor in whole] if are_copies else whole


class BucketHashError(WeightTransferError):
    """A bucket that arrived is not the bucket that was sent."""


def write_digest(bucket_B: torch.Tensor, digest_D: torch.Tensor) -> None:
    """Write the hash of a bucket's bytes into ``DIGEST_BYTES`` others; both are uint8 on the host."""
    digest_D.copy_(torch.frombuffer(bytearray(_digest(bucket_B)), dtype=torch.uint8))


def check_digest(bucket_B: torch.Tensor, digest_D: torch.Tensor, name: str) -> None:
    """Hash the bytes that arrived, and compare with the hash that arrived.

    Raises:
        BucketHashError: it is not what the sender hashed; names the bucket and both hashes.
    """
    sent_digest, digest = bytes(digest_D.numpy()), _digest(bucket_B)
    if sent_digest != digest:
        raise BucketHashError(
            f"{name} was sent as {sent_digest.hex()} and arrived as {digest.hex()} (xxh3_128)"
        )


def _digest(bytes_B: torch.Tensor) -> bytes:
    return xxhash.xxh3_128_digest(bytes_B.numpy().data)


def pack(tensors: Sequence[torch.Tensor], into_B: torch.Tensor) -> None:
    """Copy tensors one after the other into a uint8 buffer of exactly their size."""
    offset = 0
    for tensor in tensors:
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        into_B[offset : offset + flat.numel()].copy_(flat)
        offset += flat.numel()

    if offset != into_B.numel():
        raise ValueError(f"packed {offset} bytes into a bucket of {into_B.numel()}")


def unpack(buffer_B: torch.Tensor, bucket: Bucket) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields views into the buffer by name; copies where the offset is not aligned to the dtype."""
    offset = 0
    for parameter in bucket:
        flat = buffer_B[offset : offset + parameter.num_bytes]
        if offset % parameter.torch_dtype.itemsize:
            flat = flat.clone()

        yield parameter.name, flat.view(parameter.torch_dtype).view(parameter.shape)
        offset += parameter.num_bytes
