"""Sender and receiver of one transfer: the learner's parameters, bucket by bucket, into host memory
of every engine worker.

Phase one (here): buckets travel while generation goes on; the receiver hashes them, keeps them in
host memory, loads nothing, and can be thrown away. Phase two (``weights/vllm_engine.py``): the
engine pauses and loads what is already in its memory. Messages are one broadcast a bucket, one
barrier a transfer. A bucket with a wrong hash is told by its own receiver, and leaves the group
whole; a member that dies or stalls fails the transfer of all, and the group is built again.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Protocol, Self, cast

import torch
from torch._C._distributed_c10d import TCPStore

from eopd.types import WeightTransferError
from eopd.weights.layout import (
    DIGEST_BYTES,
    Bucket,
    BucketHashError,
    ParameterMeta,
    bucket_num_bytes,
    cut_into_buckets,
    pack,
    seal,
    unpack,
    verify,
)
from eopd.weights.wire import Backend, Rendezvous, Wire, WireError, open_store, open_wire

# a transfer that the sender has finished ends on the receiver within moments, also on a busy
# machine
SETTLE_S = 5.0


class ParameterSource(Protocol):
    """The learner's parameters as checkpoint tensors (``weights/source.py``); every rank
    walks it in step.
    """

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
    secret: str
    connect_timeout_s: float
    timeout_s: float
    buckets: Sequence[Sequence[Mapping[str, object]]]

    def rendezvous(self, worker: int) -> Rendezvous:
        """Where worker number ``worker`` joins."""
        return Rendezvous(
            address=self.address,
            port=self.port,
            rank=self.rank + worker,
            world_size=self.world_size,
            secret=self.secret,
            connect_timeout_s=self.connect_timeout_s,
            timeout_s=self.timeout_s,
        )

    def layout(self) -> tuple[Bucket, ...]:
        """The buckets, typed again after the journey."""
        return tuple(tuple(map(_parameter, bucket)) for bucket in self.buckets)


def _parameter(values: Mapping[str, object]) -> ParameterMeta:
    shape = cast(Sequence[int], values["shape"])
    return ParameterMeta(str(values["name"]), str(values["dtype"]), tuple(shape))


class WeightSender:
    """The learner's end. ``open``, then ``accept`` while the engines connect, then ``send`` for
    every version; ``open`` again with the engines that are alive after any of them failed.

    All learner ranks call all methods; only rank 0 touches the wire. ``connect_timeout_s`` is that
    of the handshake, ``timeout_s`` of each bucket.
    """

    def __init__(
        self,
        source: ParameterSource,
        *,
        rank: int,
        backend: Backend,
        address: str,
        bucket_bytes: int,
        connect_timeout_s: float,
        timeout_s: float,
    ) -> None:
        self._source = source
        self._is_sender = rank == 0
        self._backend = backend
        self._address = address
        self._timeout_s = timeout_s
        self._connect_timeout_s = connect_timeout_s
        self._buckets = cut_into_buckets(source.metadata(), bucket_bytes)
        self._store: TCPStore | None = None
        self._wire: Wire | None = None

    def open(self, engine_workers: Sequence[int], secret: str) -> list[dict[str, object]]:
        """Leave the group there was, and open a store for engines with so many workers each, who
        know ``secret``.

        Returns:
            One ``InitInfo`` an engine, as a dict; empty on ranks that do not send.
        """
        self.close()
        if not self._is_sender:
            return []

        self._store = open_store(self._address, self._connect_timeout_s)
        self._world_size = 1 + sum(engine_workers)
        self._secret = secret
        buckets = [list(map(asdict, bucket)) for bucket in self._buckets]

        return [
            asdict(
                InitInfo(
                    backend=self._backend,
                    address=self._address,
                    port=self._store.port,
                    rank=1 + sum(engine_workers[:engine]),
                    world_size=self._world_size,
                    secret=secret,
                    connect_timeout_s=self._connect_timeout_s,
                    timeout_s=self._timeout_s,
                    buckets=buckets,
                )
            )
            for engine in range(len(engine_workers))
        ]

    def accept(self) -> None:
        """Join as rank 0; returns when every engine has joined.

        Raises:
            WireError: one has not within ``connect_timeout_s``, or there is no open store. The rest
                is told by their own calls; ``open`` begins anew.
        """
        if not self._is_sender:
            return

        if self._store is None:
            raise WireError("weight transfer: accept before open")

        rendezvous = Rendezvous(
            address=self._address,
            port=self._store.port,
            rank=0,
            world_size=self._world_size,
            secret=self._secret,
            connect_timeout_s=self._connect_timeout_s,
            timeout_s=self._timeout_s,
        )

        try:
            self._wire = open_wire(self._backend, rendezvous, self._store)
        except WireError:
            self.close()
            raise

    def send(self) -> int:
        """Send every bucket with its hash.

        Returns:
            The bytes of all parameters, once every receiver has all of them; 0 on other ranks.

        Raises:
            WireError: a receiver died or stalled, or there is no group. The group is gone; the
                receivers' transfers fail too.
        """
        try:
            return self._send()
        except BaseException:
            self.close()  # the receivers must not wait for the time-out to learn that nothing comes
            raise

    def close(self) -> None:
        """Leave the group and close the store; safe at any time."""
        if self._wire is not None:
            self._wire.close()

        self._wire = self._store = None

    def _send(self) -> int:
        sent = 0
        failure = (
            WireError("no group to send to: open, accept")
            if self._is_sender and self._wire is None
            else None
        )

        for bucket in self._buckets:
            # to the last bucket, also after a failure: other ranks gather along
            tensors = self._source.gather(bucket)
            if tensors is None or failure is not None:
                continue

            failure = self._broadcast(bucket, tensors)
            sent += bucket_num_bytes(bucket)

        if failure is not None:
            raise failure

        if self._wire is not None:
            self._wire.barrier()

        return sent

    def _broadcast(self, bucket: Bucket, tensors: Sequence[torch.Tensor]) -> WireError | None:
        assert self._wire is not None
        message_B = _message(bucket)
        bucket_B, digest_D = _parts(message_B)
        pack(tensors, bucket_B)
        seal(bucket_B, digest_D)

        try:
            self._wire.broadcast(message_B)
        except WireError as error:
            return error

        return None


class WeightReceiver:
    """The worker's end: a thread takes and hashes the buckets while the engine goes on stepping."""

    def __init__(self, info: InitInfo, worker: int) -> None:
        self._wire = open_wire(info.backend, info.rendezvous(worker))
        self._buckets = info.layout()
        self._timeout_s = info.timeout_s
        self._transfer: _Transfer | None = None

    def start(self) -> None:
        """Begin to receive; returns at once. What was received and never taken is thrown away.

        Raises:
            WeightTransferError: the group has failed, or an earlier transfer is still on its way.
        """
        if self._transfer is not None and not self._transfer.ends_within(SETTLE_S):
            raise WeightTransferError("a weight transfer is still on its way")

        if not self._wire.is_open:
            raise WireError("the group of an earlier weight transfer has failed: connect again")

        self._transfer = _Transfer.start(self._wire, self._buckets)

    def check(self) -> None:
        """After the sender's ``send``: everything is here, and every hash is right.

        Raises:
            WeightTransferError: as ``take``.
        """
        self._started().result(SETTLE_S)

    def take(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Wait for the transfer to end; its parameters, once.

        Raises:
            WeightTransferError: no transfer was started, it failed, a bucket's hash was wrong
                (``BucketHashError``), or it did not end in time.
        """
        buffers = self._started().result(self._timeout_s)
        self._transfer = None
        return chain.from_iterable(map(unpack, buffers, self._buckets))

    def close(self) -> None:
        """Leave the group. A transfer under way ends by itself, at the latest at its time-out."""
        self._wire.close()

    def _started(self) -> "_Transfer":
        if self._transfer is None:
            raise WeightTransferError("no weight transfer was started")

        return self._transfer


class _Transfer:
    """One set of buckets on its way into host memory."""

    def __init__(self, wire: Wire, buckets: Sequence[Bucket]) -> None:
        self._wire = wire
        self._buckets = buckets
        self._messages = [_message(bucket) for bucket in buckets]
        self._error: RuntimeError | None = None
        self._arrived = False  # all of it, whatever may end the thread before
        self._thread = threading.Thread(target=self._receive, name="weight-receiver", daemon=True)

    @classmethod
    def start(cls, wire: Wire, buckets: Sequence[Bucket]) -> Self:
        transfer = cls(wire, buckets)
        transfer._thread.start()
        return transfer

    def _receive(self) -> None:
        """Take all buckets, also after one with a wrong hash: what is wrong here must not
        fail the others.
        """
        try:
            for index in range(len(self._messages)):
                self._wire.broadcast(self._messages[index])
                self._verify(index)

            self._wire.barrier()
            self._arrived = True
        except (
            RuntimeError
        ) as error:  # what the wires, gloo and nccl raise; handed to whoever takes the result
            self._error = error

    def _verify(self, index: int) -> None:
        bucket = self._buckets[index]
        name = f"bucket {index + 1} of {len(self._buckets)} ({bucket[0].name} to {bucket[-1].name})"

        try:
            verify(*_parts(self._messages[index]), name)
        except BucketHashError as error:
            self._error = self._error or error

    def ends_within(self, timeout_s: float) -> bool:
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def result(self, timeout_s: float) -> list[torch.Tensor]:
        if not self.ends_within(timeout_s):
            raise WeightTransferError(f"weight transfer did not end within {timeout_s:g} s")

        if isinstance(self._error, BucketHashError):
            raise self._error

        if self._error is not None:
            raise WeightTransferError(f"weight transfer failed: {self._error}") from self._error

        if not self._arrived:
            raise WeightTransferError(
                "weight transfer failed: its thread has ended; its error is in the log"
            )

        return [_parts(message_B)[0] for message_B in self._messages]


def _message(bucket: Bucket) -> torch.Tensor:
    return torch.empty(bucket_num_bytes(bucket) + DIGEST_BYTES, dtype=torch.uint8)


def _parts(message_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of a message: the bucket, and its hash."""
    return message_B[:-DIGEST_BYTES], message_B[-DIGEST_BYTES:]
