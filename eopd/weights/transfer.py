"""Sender and receiver of one transfer: the learner's parameters, bucket by bucket, into host memory of every engine
worker.

Phase one (here): buckets travel while generation goes on; the receiver keeps them in host memory, loads nothing, and
can be thrown away. Phase two (``weights/vllm_engine.py``): the engine pauses and loads what is already in its memory.
Messages are one broadcast a bucket, one barrier a transfer.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol, Self

import torch

from eopd.weights.layout import Bucket, ParameterMeta, bucket_num_bytes, cut_into_buckets, pack, unpack
from eopd.weights.wire import Backend, Rendezvous, Wire, open_store, open_wire

SETTLE_S = 1.0  # a transfer that the sender has finished ends on the receiver within moments


class ParameterSource(Protocol):
    """The learner's parameters as checkpoint tensors (``weights/source.py``); every rank walks it in step."""

    def metadata(self) -> Sequence[ParameterMeta]:
        """What ``buckets`` will yield, without gathering anything."""
        ...

    def gather(self, bucket: Bucket) -> Sequence[torch.Tensor] | None:
        """Full tensors of one bucket on rank 0, None elsewhere; a collective under ZeRO-3."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class InitInfo:
    """What one engine needs to join, as it travels through vLLM's ``init_weight_transfer_engine``.

    ``rank`` is the engine's first; its worker number w (tensor parallel) joins as ``rank + w``.
    """

    backend: Backend
    address: str
    port: int
    rank: int
    world_size: int
    timeout_s: float
    buckets: Sequence[Sequence[Mapping[str, object]]]

    def rendezvous(self, worker: int) -> Rendezvous:
        """Where worker number ``worker`` joins."""
        return Rendezvous(
            address=self.address,
            port=self.port,
            rank=self.rank + worker,
            world_size=self.world_size,
            timeout_s=self.timeout_s,
        )

    def layout(self) -> tuple[Bucket, ...]:
        """The buckets, typed again after the journey."""
        return tuple(
            tuple(ParameterMeta(str(p["name"]), str(p["dtype"]), tuple(p["shape"])) for p in bucket)  # type: ignore[arg-type]
            for bucket in self.buckets
        )


class WeightSender:
    """The learner's end. ``open``, then ``accept`` while the engines connect, then ``send`` for every version.

    All learner ranks call all methods; only rank 0 touches the wire.
    """

    def __init__(
        self, source: ParameterSource, *, rank: int, backend: Backend, address: str, bucket_bytes: int, timeout_s: float
    ) -> None:
        self._source = source
        self._is_sender = rank == 0
        self._backend = backend
        self._address = address
        self._timeout_s = timeout_s
        self._buckets = cut_into_buckets(source.metadata(), bucket_bytes)
        self._wire: Wire | None = None

    def open(self, engine_workers: Sequence[int]) -> list[dict[str, object]]:
        """Open a store for engines with so many workers each.

        Returns:
            One ``InitInfo`` an engine, as a dict; empty on ranks that do not send.
        """
        if not self._is_sender:
            return []
        self._store = open_store(self._address, self._timeout_s)
        self._world_size = 1 + sum(engine_workers)
        buckets = [[asdict(parameter) for parameter in bucket] for bucket in self._buckets]
        return [
            asdict(
                InitInfo(
                    backend=self._backend,
                    address=self._address,
                    port=self._store.port,
                    rank=1 + sum(engine_workers[:engine]),
                    world_size=self._world_size,
                    timeout_s=self._timeout_s,
                    buckets=buckets,
                )
            )
            for engine in range(len(engine_workers))
        ]

    def accept(self) -> None:
        """Join as rank 0; returns when every engine has joined."""
        if self._is_sender:
            rendezvous = Rendezvous(
                address=self._address,
                port=self._store.port,
                rank=0,
                world_size=self._world_size,
                timeout_s=self._timeout_s,
            )
            self._wire = open_wire(self._backend, rendezvous, self._store)

    def send(self) -> int:
        """Send every bucket; returns the bytes sent once every receiver has all of them (0 on other ranks)."""
        sent = 0
        for bucket in self._buckets:
            tensors = self._source.gather(bucket)
            if tensors is not None and self._wire is not None:
                buffer_B = torch.empty(bucket_num_bytes(bucket), dtype=torch.uint8)
                pack(tensors, buffer_B)
                self._wire.broadcast(buffer_B)
                sent += buffer_B.numel()
        if self._wire is not None:
            self._wire.barrier()
        return sent


class WeightReceiver:
    """The worker's end: a thread takes the buckets while the engine goes on stepping."""

    def __init__(self, info: InitInfo, worker: int) -> None:
        self._wire = open_wire(info.backend, info.rendezvous(worker))
        self._buckets = info.layout()
        self._timeout_s = info.timeout_s
        self._transfer: _Transfer | None = None

    def start(self) -> None:
        """Begin to receive; returns at once. What was received and never taken is thrown away.

        Raises:
            RuntimeError: an earlier transfer is still on its way.
        """
        if self._transfer is not None and not self._transfer.ends_within(SETTLE_S):
            raise RuntimeError("a weight transfer is still on its way")
        self._transfer = _Transfer.start(self._wire, self._buckets)

    def take(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Wait for the transfer to end and yield its parameters, once.

        Raises:
            RuntimeError: no transfer was started, it failed, or it did not end in time.
        """
        transfer, self._transfer = self._transfer, None
        if transfer is None:
            raise RuntimeError("no weight transfer was started")
        buffers = transfer.result(self._timeout_s)
        for buffer_B, bucket in zip(buffers, self._buckets, strict=True):
            yield from unpack(buffer_B, bucket)


class _Transfer:
    """One set of buckets on its way into host memory."""

    def __init__(self, wire: Wire, buckets: Sequence[Bucket]) -> None:
        self._wire = wire
        self._buffers = [torch.empty(bucket_num_bytes(bucket), dtype=torch.uint8) for bucket in buckets]
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._receive, name="weight-receiver", daemon=True)

    @classmethod
    def start(cls, wire: Wire, buckets: Sequence[Bucket]) -> Self:
        transfer = cls(wire, buckets)
        transfer._thread.start()
        return transfer

    def _receive(self) -> None:
        try:
            for buffer_B in self._buffers:
                self._wire.broadcast(buffer_B)
            self._wire.barrier()
        except RuntimeError as error:  # what gloo and nccl raise; handed to whoever takes the result
            self._error = error

    def ends_within(self, timeout_s: float) -> bool:
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def result(self, timeout_s: float) -> list[torch.Tensor]:
        if not self.ends_within(timeout_s):
            raise RuntimeError(f"weight transfer did not end within {timeout_s} s")
        if self._error is not None:
            raise RuntimeError(f"weight transfer failed: {self._error}") from self._error
        return self._buffers
