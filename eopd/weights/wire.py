"""The wires: how bytes get from the learner's rank 0 to every engine worker, ``gloo`` or ``nccl``.

A wire is one process group made by hand over a TCP store of its own: no default group is touched, so it cannot clash
with DeepSpeed's or with vLLM's. Both ends of each wire stand side by side here.
"""

import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, Protocol

import torch
from torch._C._distributed_c10d import BarrierOptions, BroadcastOptions, ProcessGroupGloo, TCPStore

Backend = Literal["gloo", "nccl"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendezvous:
    """Where and as whom to join. Rank 0 is the sender."""

    address: str
    port: int
    rank: int
    world_size: int
    timeout_s: float


class Wire(Protocol):
    """What sender and receiver need of a group."""

    def broadcast(self, buffer_B: torch.Tensor) -> None:
        """Send (rank 0) or receive (others) a uint8 host buffer; raises after the time-out."""
        ...

    def barrier(self) -> None:
        """Return when every member has arrived; raises after the time-out."""
        ...


def open_store(address: str, timeout_s: float) -> TCPStore:
    """The sender's store on a free port; ``store.port`` tells which."""
    return TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))


def open_wire(backend: Backend, rendezvous: Rendezvous, store: TCPStore | None = None) -> Wire:
    """Join the group; blocks until all members have. The sender hands in the store it opened."""
    timeout = timedelta(seconds=rendezvous.timeout_s)
    if store is None:
        store = TCPStore(rendezvous.address, rendezvous.port, is_master=False, timeout=timeout)
    if backend == "gloo":
        return GlooWire(store, rendezvous, timeout)
    return NcclWire(store, rendezvous)


class GlooWire:
    """Through host memory, over TCP."""

    def __init__(self, store: TCPStore, rendezvous: Rendezvous, timeout: timedelta) -> None:
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = timeout
        options._devices = [ProcessGroupGloo.create_device(hostname=_own_address(rendezvous))]
        self._group = ProcessGroupGloo(store, rendezvous.rank, rendezvous.world_size, options)

    def broadcast(self, buffer_B: torch.Tensor) -> None:
        """See ``Wire``."""
        self._group.broadcast([buffer_B], BroadcastOptions()).wait()  # type: ignore[attr-defined]

    def barrier(self) -> None:
        """See ``Wire``."""
        self._group.barrier(BarrierOptions()).wait()  # type: ignore[attr-defined]


class NcclWire:
    """Between GPUs, through one device buffer of the largest bucket so far; the host keeps the weights until they are
    loaded.

    Uses vLLM's own NCCL communicator (``PyNcclCommunicator`` over ``StatelessProcessGroup``, vLLM 0.32.0).
    """

    def __init__(self, store: TCPStore, rendezvous: Rendezvous) -> None:
        from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
        from vllm.distributed.utils import StatelessProcessGroup

        self._device = torch.device("cuda", torch.cuda.current_device())
        group = StatelessProcessGroup(rank=rendezvous.rank, world_size=rendezvous.world_size, store=store)
        self._communicator = PyNcclCommunicator(group, device=self._device)
        self._is_sender = rendezvous.rank == 0
        self._timeout_s = rendezvous.timeout_s
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._staging_B = torch.empty(0, dtype=torch.uint8, device=self._device)

    def broadcast(self, buffer_B: torch.Tensor) -> None:
        """See ``Wire``."""
        with torch.cuda.stream(self._stream):
            if self._staging_B.numel() < buffer_B.numel():
                self._staging_B = torch.empty(buffer_B.numel(), dtype=torch.uint8, device=self._device)
            staged_B = self._staging_B[: buffer_B.numel()]
            if self._is_sender:
                staged_B.copy_(buffer_B)
            self._communicator.broadcast(staged_B, src=0, stream=self._stream)
            if not self._is_sender:
                buffer_B.copy_(staged_B, non_blocking=True)
        self._wait()

    def barrier(self) -> None:
        """See ``Wire``: an all-reduce of one element that every member must enter."""
        with torch.cuda.stream(self._stream):
            self._communicator.all_reduce(torch.zeros(1, device=self._device), stream=self._stream)
        self._wait()

    def _wait(self) -> None:
        """Until the stream is done; a peer that never enters the collective costs one time-out."""
        event = self._stream.record_event()
        deadline = time.monotonic() + self._timeout_s
        while not event.query():
            if time.monotonic() > deadline:
                raise RuntimeError(f"NCCL did not answer within {self._timeout_s:g} s")
            time.sleep(0.001)


def _own_address(rendezvous: Rendezvous) -> str:
    """The address of this host that the sender's host can reach."""
    if rendezvous.rank == 0:
        return rendezvous.address
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # UDP connect sends nothing
        probe.connect((rendezvous.address, rendezvous.port))
        return str(probe.getsockname()[0])
