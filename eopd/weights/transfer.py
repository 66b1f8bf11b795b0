"""Sender and receiver of one transfer: the learner's parameters, bucket by bucket, into host memory
of every engine.

For example three parameters of 60, 30 and 50 bytes, in buckets of at most 100 bytes:

    learner ranks            rank 0                            every engine's first worker
    ─────────────            ──────                            ───────────────────────────
    gather p0, p1 ────▶ [ p0  60 B | p1 30 B | hash 16 B ] ──▶ hash, keep       a broadcast for each
    gather p2     ────▶ [ p2  50 B | hash 16 B ] ────────────▶ hash, keep       bucket, and at the
                        barrier                          ◀───▶ barrier          end one barrier

The stages overlap: while a message is hashed and sent, the next bucket is gathered and packed; while
one arrives, the one before it is hashed.

On one host the message is not sent: it is packed into memory that the engines have mapped
(``weights/shared.py``), and only its hash travels. In the same way the other workers of an engine
read what its first one has received.

This is phase one of a weight sync: buckets travel while generation goes on, and nothing is loaded.
In phase two (``weights/vllm_receiver.py``) the engine pauses, and loads what is in its memory.

The receiver of a bucket with a wrong hash reports it, and the group stays as it is. A member that
dies or stalls fails the transfer for all, and the group is built again.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from typing import TypeVar, cast

import torch
from torch._C._distributed_c10d import TCPStore

from eopd.daemon import in_daemon
from eopd.types import WeightTransferError
from eopd.weights.layout import (
    DIGEST_BYTES,
    Bucket,
    BucketHashError,
    ModelSource,
    ParameterMeta,
    bucket_num_bytes,
    check_digest,
    cut_into_buckets,
    pack,
    unpack,
    write_digest,
)
from eopd.weights.lifeline import Lifeline
from eopd.weights.shared import SharedMemory, map_messages
from eopd.weights.wire import (
    Backend,
    Rendezvous,
    Wire,
    WireError,
    import_nccl,
    open_store,
    open_wire,
)

T = TypeVar("T")

# Once the sender has finished, a receiver's transfer ends within this, also on a busy machine.
SETTLE_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class InitInfo(Rendezvous):
    """Where one engine joins, and what it will be sent: plain values, which vLLM hands through.

    ``scale`` is that of adapters that are sent alone, None where weights are sent.
    """

    buckets: Sequence[Sequence[Mapping[str, object]]]
    scale: float | None = None

    def layout(self) -> tuple[Bucket, ...]:
        """Returns the buckets, typed again after the journey."""
        return tuple(tuple(map(_parameter, bucket)) for bucket in self.buckets)

    def map(self, memory: str) -> list[torch.Tensor]:
        """Returns the messages in a process's memory, by its path.

        Raises:
            WeightTransferError: it cannot be mapped.
        """
        try:
            return map_messages(memory, _message_sizes(self.layout()))
        except OSError as error:
            raise WeightTransferError(f"the weights cannot be mapped: {error}") from error


def _parameter(values: Mapping[str, object]) -> ParameterMeta:
    shape = cast(Sequence[int], values["shape"])
    return ParameterMeta(str(values["name"]), str(values["dtype"]), tuple(shape))


class WeightSender:
    """The learner's end of the wire.

        open ──▶ accept, while the engines connect ──▶ send, for every version
         ▲                                              │
         └── with the engines that are alive ◀── failure

    All learner ranks call all methods; only rank 0 uses the wire. ``connect_timeout_s`` is the
    limit of the handshake, ``timeout_s`` that of each bucket.
    """

    def __init__(
        self,
        source: ModelSource,
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
        self._sizes = _message_sizes(self._buckets)
        self._rendezvous: Rendezvous | None = None
        self._lifeline: Lifeline | None = None
        self._store: TCPStore | None = None
        self._memory: SharedMemory | None = None
        self._buffers: list[torch.Tensor] = []
        self._wire: Wire | None = None
        if self._is_sender and backend == "nccl":
            import_nccl()

    def open(self, engines: int, secret: str) -> list[dict[str, object]]:
        """Leave the last group, and open a store for the next one.

        Args:
            engines: the number of engines.
            secret: what the members of the group alone will know.

        Returns:
            The fields of an ``InitInfo`` for each engine; empty on ranks that do not send.
        """
        self.close()
        if not self._is_sender:
            return []

        self._store = open_store(self._address, self._connect_timeout_s)
        self._lifeline = Lifeline.listen(self._address, self._connect_timeout_s)
        if self._backend in ("auto", "shared"):
            self._memory = self._memory or SharedMemory(self._sizes)
            self._memory.mark(secret)

        self._rendezvous = Rendezvous(
            backend=self._backend,
            address=self._address,
            port=self._store.port,
            lifeline_port=self._lifeline.port,
            rank=0,
            world_size=1 + engines,
            secret=secret,
            connect_timeout_s=self._connect_timeout_s,
            timeout_s=self._timeout_s,
            memory=self._memory.path if self._memory else "",
        )
        fields = asdict(self._rendezvous)
        buckets = [list(map(asdict, bucket)) for bucket in self._buckets]
        sent = {"buckets": buckets, "scale": self._source.scale}
        return [{**fields, **sent, "rank": rank} for rank in range(1, 1 + engines)]

    def accept(self) -> None:
        """Join as rank 0; returns when every engine has joined.

        Raises:
            WireError: one has not within ``connect_timeout_s``, or there is no open store. The
                calls of the other members fail too; ``open`` begins anew.
        """
        if not self._is_sender:
            return

        if self._rendezvous is None:
            raise WireError("weight transfer: accept before open")

        try:
            self._wire = open_wire(
                self._rendezvous, store=self._store, lifeline=self._lifeline, memory=self._memory
            )
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
        for open_end in (self._wire, self._lifeline):
            if open_end is not None:
                open_end.close()

        self._wire = self._store = self._lifeline = self._rendezvous = None

    def _send(self) -> int:
        wire = self._wire
        with ThreadPoolExecutor(1, "weight-sender") as thread:
            sending = thread.submit(_nothing)
            for index, bucket in enumerate(self._buckets):
                # to the last bucket, also after a failure: the other ranks gather all of them
                tensors = self._source.gather(bucket)
                if tensors is None or wire is None:
                    continue

                message_B = self._message(wire, index)
                pack(tensors, _split(message_B)[0])
                if sending.exception() is None:  # once the message before has been sent
                    sending = thread.submit(_hash_and_send, wire, message_B)

        sending.result()
        if wire is not None:
            wire.barrier()
        elif self._is_sender:
            raise WireError("no group to send to: open, accept")

        return sum(map(bucket_num_bytes, self._buckets)) if self._is_sender else 0

    def _message(self, wire: Wire, index: int) -> torch.Tensor:
        """Returns uint8 host memory for a message, of which the one before it is still being sent.

        GPUs read it at full speed only where it is pinned.
        """
        if wire.is_in_place and self._memory is not None:
            return self._memory.reserve()[index]

        if not self._buffers:
            pins, largest = self._backend == "nccl", max(self._sizes)
            self._buffers = [
                torch.empty(largest, dtype=torch.uint8, pin_memory=pins) for _ in self._sizes[:2]
            ]

        return self._buffers[index % 2][: self._sizes[index]]


def _hash_and_send(wire: Wire, message_B: torch.Tensor) -> None:
    bucket_B, digest_D = _split(message_B)
    write_digest(bucket_B, digest_D)
    wire.broadcast(digest_D if wire.is_in_place else message_B)


def _nothing() -> None:
    """Stands for the message before the first one."""


class WeightReader:
    """The end of an engine's other workers, which read what the first one has received and checked.

    ``memory`` is the path of what it received.
    """

    def __init__(self, info: InitInfo, memory: str) -> None:
        self.scale = info.scale
        self.memory = memory
        self._info = info
        self._messages: Sequence[torch.Tensor] = info.map(memory)

    def start(self) -> None:
        """Maps the memory anew, and returns at once: another worker receives.

        Raises:
            WeightTransferError: the memory is gone.
        """
        self._messages = self._info.map(self.memory)

    def check(self) -> None:
        """Returns at once: another worker checks."""

    def take(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Returns the parameters by name; can be done once."""
        messages, self._messages = self._messages, ()
        return _unpacked(messages, self._info.layout())

    def close(self) -> None:
        """Returns at once: it is in no group."""


class WeightReceiver:
    """The end of an engine's first worker: a thread receives and hashes buckets while the engine
    generates. ``memory`` is the path of what it receives, for its other workers.

    Buckets are mapped anew for every transfer: where a loader has changed one in place, nobody sees
    the change, and this worker does not see it again.
    """

    def __init__(self, info: InitInfo) -> None:
        self.scale = info.scale
        self._info = info
        self._own: SharedMemory | None = None
        self._transfer: Future[Sequence[torch.Tensor]] | None = None
        self._wire = open_wire(info)
        if not self._wire.is_in_place:
            self._own = SharedMemory(_message_sizes(info.layout()))
            self._own.reserve()

        self.memory = info.memory if self._own is None else self._own.path

    def start(self) -> None:
        """Begin to receive, and return at once. What was received and never taken is discarded.

        Raises:
            WeightTransferError: the group has failed, or an earlier transfer is still on its way.
        """
        if self._transfer is not None and wait([self._transfer], SETTLE_S).not_done:
            raise WeightTransferError("a weight transfer is still on its way")

        if not self._wire.is_open:
            raise WireError("the group of an earlier weight transfer has failed: connect again")

        messages = self._info.map(self.memory)
        arriving = [torch.empty(DIGEST_BYTES, dtype=torch.uint8) for _ in messages]
        receive = partial(
            _receive,
            self._wire,
            self._info.layout(),
            arriving=arriving if self._own is None else self._own.reserve(),
            messages=messages,
        )
        self._transfer = in_daemon(receive, "weight-receiver")

    def check(self) -> None:
        """Find out, after the sender's ``send``, that everything is here and every hash is right.

        Raises:
            WeightTransferError: as ``take`` does.
        """
        _arrived(self._started(), SETTLE_S)

    def take(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Wait for the transfer to end, and return its parameters by name; can be done once.

        Raises:
            WeightTransferError: no transfer was started, it failed, a bucket's hash was wrong
                (``BucketHashError``), or it did not end in time.
        """
        messages = _arrived(self._started(), self._info.timeout_s)
        self._transfer = None
        return _unpacked(messages, self._info.layout())

    def close(self) -> None:
        """Leave the group. A transfer under way ends by itself, at its time-out at the latest."""
        self._wire.close()

    def _started(self) -> Future[Sequence[torch.Tensor]]:
        if self._transfer is None:
            raise WeightTransferError("no weight transfer was started")

        return self._transfer


def _receive(
    wire: Wire,
    buckets: Sequence[Bucket],
    *,
    arriving: Sequence[torch.Tensor],
    messages: Sequence[torch.Tensor],
) -> Sequence[torch.Tensor]:
    """Receives all buckets, also after one with a wrong hash: a fault of this receiver must not fail
    the others. Returns ``messages``.

    Args:
        wire: where they come from.
        buckets: what they hold.
        arriving: what the wire fills; where messages are in place only their hashes.
        messages: the same memory, as the engine reads it.
    """
    with ThreadPoolExecutor(1, "weight-hash") as thread:
        checks = []
        for index, arriving_B in enumerate(arriving):
            wire.broadcast(arriving_B)
            first, last = buckets[index][0].name, buckets[index][-1].name
            name = f"bucket {index + 1} of {len(buckets)} ({first} to {last})"
            bucket_B, digest_D = _split(messages[index])[0], arriving_B[-DIGEST_BYTES:]
            checks.append(thread.submit(check_digest, bucket_B, digest_D, name))

    wire.barrier()
    for check in checks:
        check.result()

    return messages


def _arrived(transfer: Future[T], timeout_s: float) -> T:
    """Returns what a transfer brings.

    Raises:
        WeightTransferError: see ``WeightReceiver.take``.
    """
    try:
        return transfer.result(timeout_s)
    except BucketHashError:
        raise
    except TimeoutError:
        raise WeightTransferError(f"weight transfer did not end within {timeout_s:g} s") from None
    except Exception as error:  # whatever has ended its thread
        raise WeightTransferError(f"weight transfer failed: {error}") from error


def _unpacked(
    messages: Sequence[torch.Tensor], buckets: Sequence[Bucket]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Returns views of all parameters, by name."""
    return chain.from_iterable(
        unpack(_split(message_B)[0], bucket)
        for message_B, bucket in zip(messages, buckets, strict=True)
    )


def _message_sizes(buckets: Sequence[Bucket]) -> list[int]:
    return [bucket_num_bytes(bucket) + DIGEST_BYTES for bucket in buckets]


def _split(message_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns views of a message: the bucket, and its hash."""
    return message_B[:-DIGEST_BYTES], message_B[-DIGEST_BYTES:]
