"""Host memory that processes share: weights are written once, and read where they are. The sender
shares it with the engines of its host, and the first worker of an engine with the others.

    writer      [ mark 64 B | message 0 | message 1 | ... ]   one file of memory, without a name
                                   ▲
    readers     /proc/PID/fd/N ────┘  mapped, each with pages of its own where it writes

An engine that finds the group's mark behind the path can map the memory. On another host, or in
another container, it finds none: such a group sends its weights over sockets (``wire.py``). The file
lives as long as somebody has it open or mapped, so that a process that is killed leaves nothing
behind, and its size is not limited by ``/dev/shm``.
"""

import hashlib
import mmap
import os
import stat
from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch

_ALIGNED = 64  # bytes: every message begins on a cache line, and its tensors need no copy


class SharedMemory:
    """The writer's end: memory for messages of these sizes, in bytes, once ``reserve`` is called."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = sizes
        self._file = os.memfd_create("eopd-weights", os.MFD_CLOEXEC)
        self._messages: list[torch.Tensor] = []

    @property
    def path(self) -> str:
        """Where the other processes of this host find it."""
        return f"/proc/{os.getpid()}/fd/{self._file}"

    def mark(self, secret: str) -> None:
        """Let the members of a group recognise the memory."""
        os.pwrite(self._file, _mark(secret), 0)

    def reserve(self) -> list[torch.Tensor]:
        """Returns uint8 tensors of the sizes, which all readers see; the same ones every time."""
        if not self._messages:
            os.ftruncate(self._file, _total(self._sizes))
            self._messages = list(_cut(mmap.mmap(self._file, _total(self._sizes)), self._sizes))

        return self._messages

    def __del__(self) -> None:
        os.close(self._file)


def is_reachable(path: str, secret: str) -> bool:
    """Returns whether this process sees a group's memory behind the path. On another host it may be
    anything, such as a pipe of somebody else, which is neither waited for nor read.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return False

        with open(path, "rb") as file:
            return file.read(_ALIGNED) == _mark(secret)
    except OSError:
        return False


def map_messages(path: str, sizes: Sequence[int]) -> list[torch.Tensor]:
    """Returns the writer's messages, for a reader.

    Whatever the reader writes into them stays its own (``MAP_PRIVATE``): a loader that changes a
    tensor in place cannot change the weights of the other engines.

    Raises:
        OSError: the memory cannot be mapped.
    """
    with open(path, "rb") as file:
        memory = mmap.mmap(
            file.fileno(),
            _total(sizes),
            flags=mmap.MAP_PRIVATE,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
        )

    return list(_cut(memory, sizes))


def _mark(secret: str) -> bytes:
    return hashlib.sha512(secret.encode()).digest()


def _starts(sizes: Sequence[int]) -> list[int]:
    """Returns where each message begins, and at last where the memory ends."""
    lengths = (-(-size // _ALIGNED) * _ALIGNED for size in sizes)
    return list(accumulate(lengths, initial=_ALIGNED))


def _total(sizes: Sequence[int]) -> int:
    return _starts(sizes)[-1]


def _cut(memory: mmap.mmap, sizes: Sequence[int]) -> Iterator[torch.Tensor]:
    for start, size in zip(_starts(sizes), sizes, strict=False):
        yield torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=start)
