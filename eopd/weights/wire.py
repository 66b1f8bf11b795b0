"""The wires: how bytes get from the learner's rank 0 to the first worker of every engine.

    shared   through memory of one host, which gloo announces     all members are on the sender's host
    gloo     through host memory, over TCP                        anywhere
    nccl     from GPU to GPU                                      whole GPUs at both ends
    auto     shared where every engine sees the sender's memory, else gloo

A wire is a process group of its own over a TCP store of its own. No default group is touched, so it
cannot clash with DeepSpeed's or with vLLM's. Both ends of each wire are in this file.

A wire that fails closes itself, and its lifelines with it (``weights/lifeline.py``): so all members
fail within moments of the first. A closed wire stays closed: the group is built again.
"""

import hashlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
from torch._C._distributed_c10d import (
    BarrierOptions,
    BroadcastOptions,
    PrefixStore,
    ProcessGroupGloo,
    Store,
    TCPStore,
    Work,
)

from eopd.network import address_towards
from eopd.types import WeightTransferError
from eopd.weights.lifeline import Lifeline
from eopd.weights.shared import SharedMemory, is_reachable

Backend = Literal["auto", "shared", "gloo", "nccl"]

ALL_HERE = "eopd/all-here"  # keys of the store: the wire that was chosen, once all are there,
SEES_MEMORY = "eopd/sees-memory"  # what each engine says of the sender's memory,
NCCL_ID = "eopd/nccl-id"  # and the id of NCCL's group

logger = logging.getLogger(__name__)
POLL_S = 0.001  # between two looks at a message under way


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendezvous:
    """Where a group meets, and which of its members this one is: rank 0 is the sender.

    The members alone know ``secret``. ``port`` is that of the sender's store. ``memory`` is the path
    of the sender's shared memory, empty where no wire would use it. ``connect_timeout_s`` is the
    limit of the handshake, ``timeout_s`` that of each message afterwards.
    """

    backend: Backend
    address: str
    port: int
    lifeline_port: int
    rank: int
    world_size: int
    secret: str
    connect_timeout_s: float
    timeout_s: float
    memory: str = ""


class WireError(WeightTransferError):
    """A member is gone, or did not answer in time. The wire is closed."""


def open_store(address: str, timeout_s: float) -> TCPStore:
    """Opens the sender's store on a free port of ``address`` alone; ``store.port`` is the port."""
    listener = socket.create_server((address, 0), backlog=1024)
    port = listener.getsockname()[1]
    return TCPStore(
        address,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
        master_listen_fd=listener.detach(),  # else it would listen on all interfaces (torch 2.13)
    )


def open_wire(
    rendezvous: Rendezvous,
    *,
    store: TCPStore | None = None,
    lifeline: Lifeline | None = None,
    memory: SharedMemory | None = None,
) -> "Wire":
    """Join the group; blocks until all members have.

    The sender passes the store and the lifeline that it opened, and the memory that it would share.

    The process group is made once all members are connected: NCCL has no time-out of its own for
    that, and a member that dies in that moment hangs the others until ``learner.timeout_s``.

    Raises:
        WireError: not all have joined within ``connect_timeout_s``; the sender's error names the
            ``ranks`` that have not.
    """
    try:
        return _meet(rendezvous, store, lifeline, memory)
    except (RuntimeError, OSError) as error:
        where = (
            f"{rendezvous.address}:{rendezvous.port}, as rank {rendezvous.rank} of "
            f"{rendezvous.world_size}"
        )
        limit = f"connect_timeout_s = {rendezvous.connect_timeout_s:g}"
        ranks = error.ranks if isinstance(error, WeightTransferError) else ()
        raise WireError(
            f"weight transfer: no group at {where}, within {limit}: {error}", ranks
        ) from error


def _meet(
    rendezvous: Rendezvous,
    store: TCPStore | None,
    lifeline: Lifeline | None,
    memory: SharedMemory | None,
) -> "Wire":
    secret, timeout = rendezvous.secret, timedelta(seconds=rendezvous.connect_timeout_s)
    if store is None:
        store = TCPStore(
            rendezvous.address,
            rendezvous.port,
            is_master=False,
            timeout=timeout,
        )

    group_store = PrefixStore(hashlib.sha256(secret.encode()).hexdigest(), store)
    if rendezvous.rank > 0 and rendezvous.memory:
        sees = is_reachable(rendezvous.memory, secret)
        group_store.set(f"{SEES_MEMORY}/{rendezvous.rank}", str(int(sees)))

    lifeline = lifeline or Lifeline.connect(
        rendezvous.address,
        rendezvous.lifeline_port,
        rank=rendezvous.rank,
        secret=secret,
        timeout_s=rendezvous.connect_timeout_s,
    )
    try:
        lifeline.accept(rendezvous.world_size, secret)
        if rendezvous.rank == 0:
            group_store.set(ALL_HERE, _choose(group_store, rendezvous, memory))
        else:
            group_store.wait([ALL_HERE], timeout)

        kind = _KINDS[group_store.get(ALL_HERE).decode()]
        return kind(group_store, rendezvous, lifeline)
    except BaseException:
        lifeline.close()
        raise


def _choose(store: Store, rendezvous: Rendezvous, memory: SharedMemory | None) -> str:
    """Returns the wire of a group that is complete; shared memory is reserved for it.

    Raises:
        WeightTransferError: it must be shared memory, and some ``ranks`` do not see it.
    """
    if memory is None:
        return rendezvous.backend

    ranks = range(1, rendezvous.world_size)
    elsewhere = [rank for rank in ranks if store.get(f"{SEES_MEMORY}/{rank}") != b"1"]
    if elsewhere and rendezvous.backend == "shared":
        raise WeightTransferError(
            f"ranks {elsewhere} do not see the memory of the learner's rank 0: with weights.backend: "
            "shared every engine must be on its host, in its container; else write auto",
            elsewhere,
        )

    if not elsewhere:
        memory.reserve()

    chosen = "gloo" if elsewhere else "shared"
    logger.info("weights travel by %s to %d engines", chosen, len(ranks))
    return chosen


class GlooWire:
    """A wire through host memory, over TCP. One thread at a time sends or receives.

    The last reference to a process group closes its sockets, and waits for a message under way;
    ``abort`` and ``shutdown`` end none (torch 2.13). So group and message are held in lists of one,
    and a thread that may sleep keeps both lists until the message has ended.
    """

    is_in_place = False  # whether all members see messages where they are, and only hashes travel

    def __init__(self, store: Store, rendezvous: Rendezvous, lifeline: Lifeline) -> None:
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = timedelta(seconds=rendezvous.connect_timeout_s)
        own = address_towards(rendezvous.address, rendezvous.port)
        options._devices = [ProcessGroupGloo.create_device(hostname=own)]
        self._timeout = timedelta(seconds=rendezvous.timeout_s)
        self._lifeline = lifeline
        self._work: list[Work] = []
        self._group = [
            ProcessGroupGloo(
                store,
                rendezvous.rank,
                rendezvous.world_size,
                options,
            )
        ]

    @property
    def is_open(self) -> bool:
        """Whether the wire has neither failed nor been closed."""
        return bool(self._group)

    def broadcast(self, message_B: torch.Tensor) -> None:
        """Send (rank 0) or receive (others) uint8 in host memory: a message, or its hash.

        Raises:
            WireError: a member is gone, or did not answer within the time-out.
        """
        options = BroadcastOptions()
        options.timeout = self._timeout
        self._wait(lambda group: group.broadcast([message_B], options))  # type: ignore[attr-defined]

    def barrier(self) -> None:
        """Return once every member has called it; raises as ``broadcast`` does."""
        options = BarrierOptions()
        options.timeout = self._timeout
        self._wait(lambda group: group.barrier(options))  # type: ignore[attr-defined]

    def close(self) -> None:
        """Leave the group: messages of the others fail. Another thread waits for one under way."""
        self._lifeline.close()
        group, message = self._group, self._work
        self._group, self._work = [], []
        if all(work.is_completed() for work in message):
            _release(group, message)
        else:
            threading.Thread(
                target=_release, args=(group, message), name="gloo-close", daemon=True
            ).start()

    def _wait(self, begin: Callable[[ProcessGroupGloo], Work]) -> None:
        if not self._group:
            raise WireError("the wire is closed: connect again")

        try:
            self._work = [begin(self._group[0])]
            self._poll(self._work)
            return
        except RuntimeError as error:
            failure, ranks = str(error), getattr(error, "ranks", ())

        self.close()
        # out here: a traceback that held group or message would keep the sockets open
        raise WireError(failure, ranks)

    def _poll(self, message: list[Work]) -> None:
        """Waits until the message has ended.

        Raises:
            WeightTransferError: a member is gone, so that the message may never end.
            RuntimeError: it failed, or ``close`` was called in another thread.
        """
        (work,) = message
        while message and not work.is_completed():
            self._lifeline.require_all()
            time.sleep(POLL_S)

        if not message:
            raise RuntimeError("the wire was closed")

        try:
            work.wait()
        except RuntimeError:
            self._lifeline.require_all()  # gloo may notice one that leaves first, and names nobody
            raise


def _release(group: list[ProcessGroupGloo], message: list[Work]) -> None:
    while message and not message[0].is_completed():
        time.sleep(0.05)

    message.clear()
    group.clear()


class SharedWire(GlooWire):
    """A wire through the memory of one host: gloo carries the hash of a message, which says that the
    message is there.
    """

    is_in_place = True


def import_nccl() -> None:
    """Imports what ``NcclWire`` is made of. It takes longer than a handshake may, where many processes
    start on a slow disk.
    """
    from vllm.distributed.device_communicators import pynccl  # noqa: F401


class NcclWire:
    """A wire between GPUs, through one device buffer of the largest bucket so far.

    While it sends, the learner gathers the next bucket over a communicator of its own. Only rank 0
    is a member of both, so neither waits for the other in a circle.

    The host keeps the weights until they are loaded. The communicator is vLLM's own
    (``PyNcclCommunicator``, vLLM 0.32.0), made from an id that travels as plain bytes: nothing that
    a store holds is unpickled.
    """

    is_in_place = False

    def __init__(self, store: Store, rendezvous: Rendezvous, lifeline: Lifeline) -> None:
        from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
        from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary
        from vllm.utils.nccl import unpinned_nccl_env

        self._device = torch.device("cuda", torch.cuda.current_device())
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        if rendezvous.rank == 0:
            store.set(NCCL_ID, bytes(NCCLLibrary().ncclGetUniqueId().internal).hex())

        unique_id = bytes.fromhex(store.get(NCCL_ID).decode())

        # vLLM would make a stream of its own, and leave it the current one. Some of its settings change
        # variables of NCCL in engines, and members whose variables differ hang.
        with torch.cuda.stream(self._stream), unpinned_nccl_env():
            self._communicator = PyNcclCommunicator.from_unique_id_bytes(
                unique_id,
                rank=rendezvous.rank,
                world_size=rendezvous.world_size,
                device=self._device,
            )

        self._is_sender = rendezvous.rank == 0
        self._timeout_s = rendezvous.timeout_s
        self._lifeline = lifeline
        self.is_open = True
        self._staging_B = torch.empty(0, dtype=torch.uint8, device=self._device)

    def broadcast(self, message_B: torch.Tensor) -> None:
        """Send or receive a message, as the other wires do."""
        self._must_be_open()
        with self._streaming():
            if self._staging_B.numel() < message_B.numel():
                self._staging_B = torch.empty(
                    message_B.numel(), dtype=torch.uint8, device=self._device
                )

            staged_B = self._staging_B[: message_B.numel()]
            if self._is_sender:
                staged_B.copy_(message_B)

            self._communicator.broadcast(staged_B, src=0, stream=self._stream)

        self._wait()
        if (
            not self._is_sender
        ):  # a copy to pageable memory may wait for the stream, without a limit
            message_B.copy_(staged_B)

    def barrier(self) -> None:
        """Return once every member has entered an all-reduce of one element."""
        self._must_be_open()
        with self._streaming():
            self._communicator.all_reduce(torch.zeros(1, device=self._device), stream=self._stream)

        self._wait()

    def close(self) -> None:
        """Abort the communicator, so that a kernel that waits for a dead peer ends."""
        if self.is_open:
            self.is_open = False
            self._lifeline.close()
            self._communicator.destroy()

    def _must_be_open(self) -> None:
        if not self.is_open:
            raise WireError("the wire is closed: connect again")

    def _streaming(self) -> AbstractContextManager[object]:
        """Makes the stream the current one. A new thread has device 0 until it is told another, and
        would be given it back.
        """
        torch.cuda.set_device(self._device)
        return torch.cuda.stream(self._stream)

    def _wait(self) -> None:
        """Waits until the stream is done; a live peer that never enters the collective costs one
        time-out.
        """
        event = self._stream.record_event()
        deadline = time.monotonic() + self._timeout_s

        try:
            while not event.query():
                time.sleep(POLL_S)
                self._lifeline.require_all()
                if time.monotonic() > deadline:
                    raise WireError(f"NCCL did not answer within {self._timeout_s:g} s")
        except WeightTransferError as error:
            self.close()
            raise WireError(str(error), error.ranks) from None


Wire = GlooWire | NcclWire
_KINDS: Mapping[str, Callable[[Store, Rendezvous, Lifeline], Wire]] = {
    "shared": SharedWire,
    "gloo": GlooWire,
    "nccl": NcclWire,
}
