"""Who is still there: one idle TCP connection from every receiver to the sender, beside the wire.

A receiver greets with the group's secret and its rank; whoever does not know the secret gets no
seat, and holds up nobody. No byte travels afterwards. A process that dies, or closes its wire,
closes its end, and the other end sees that at once; gloo (torch 2.13) does not notice a member that
dies in the middle of a message before the time-out. Receivers see only the sender, the sender sees
all: it leaves when one has left, and so tells the others. A member that is stopped, or a host that
vanishes, keeps its connection: that costs the time-out of a message.
"""

import hmac
import select
import socket
import struct
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from torch._C._distributed_c10d import Store

from eopd.types import WeightTransferError

KEY = "eopd/lifeline"
_RANK = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Lost:
    """Who has left, in words, and the rank."""

    words: str
    rank: int


class Lifeline:
    """This member's connections. Make it with ``lay`` before the group is joined, ``fasten``
    it afterwards.
    """

    def __init__(
        self, listener: socket.socket | None, peers: dict[socket.socket, Lost], timeout_s: float
    ) -> None:
        self._listener = listener
        self._peers = peers
        self._timeout_s = timeout_s

    @classmethod
    def lay(
        cls, store: Store, *, address: str, rank: int, secret: str, timeout_s: float
    ) -> "Lifeline":
        """Listen on the sender's ``address`` (rank 0), or connect to it; the port is told through
        the store.

        Raises:
            OSError: the sender cannot be reached.
            RuntimeError: the store does not answer.
        """
        if rank == 0:
            listener = socket.create_server((address, 0), backlog=1024)
            store.set(KEY, str(listener.getsockname()[1]))
            return cls(listener, {}, timeout_s)

        sender = socket.create_connection((address, int(store.get(KEY))), timeout_s)
        sender.sendall(secret.encode() + _RANK.pack(rank))

        return cls(None, {sender: Lost(f"the sender at {address} has left", 0)}, timeout_s)

    def fasten(self, world_size: int, secret: str) -> None:
        """Rank 0: take up the connections of all others. Strangers and those that stay silent delay
        nobody.

        Raises:
            WeightTransferError: some have not come in time; ``ranks`` says who.
        """
        if self._listener is None:
            return

        deadline = time.monotonic() + self._timeout_s
        missing = set(range(1, world_size))
        # who has connected, and what of a greeting has come
        waiting: dict[socket.socket, bytes] = {}
        self._listener.setblocking(False)

        try:
            while missing:
                left = deadline - time.monotonic()
                if left <= 0:
                    ranks = sorted(missing)
                    raise WeightTransferError(
                        f"ranks {ranks} have not come within {self._timeout_s:g} s", ranks
                    )

                for ready in _readable([self._listener, *waiting], left):
                    self._hear(ready, waiting, missing, secret)
        finally:
            for peer in waiting:
                peer.close()

            self._listener.close()

    def _hear(
        self,
        ready: socket.socket,
        waiting: dict[socket.socket, bytes],
        missing: set[int],
        secret: str,
    ) -> None:
        """Take up a connection, or read more of a greeting; whoever has said it whole is
        taken up or turned away.
        """
        if ready is self._listener:
            peer, _ = self._listener.accept()
            peer.setblocking(False)
            waiting[peer] = b""
            return

        length = len(secret) + _RANK.size

        with suppress(OSError):
            part = ready.recv(length - len(waiting[ready]))
            waiting[ready] += part
            if part and len(waiting[ready]) < length:
                return

        greeting = waiting.pop(ready)
        rank = _RANK.unpack(greeting[-_RANK.size :])[0] if len(greeting) == length else 0
        if rank in missing and hmac.compare_digest(greeting[: len(secret)], secret.encode()):
            missing.remove(rank)
            self._peers[ready] = Lost(f"rank {rank} at {ready.getpeername()[0]} has left", rank)
        else:
            ready.close()

    def lost(self) -> Lost | None:
        """Who has left; None while all are there."""
        poll = select.poll()  # select would refuse the high descriptors of a busy engine
        peers = {peer.fileno(): lost for peer, lost in self._peers.items()}
        if -1 in peers:
            return Lost("this member has left", 0)  # closed in another thread

        for descriptor in peers:
            poll.register(descriptor, select.POLLIN | select.POLLRDHUP)

        return next((peers[descriptor] for descriptor, _ in poll.poll(0)), None)

    def close(self) -> None:
        """Let go; the other ends notice."""
        if self._listener is not None:
            self._listener.close()

        for peer in self._peers:
            peer.close()

        self._peers = {}


def _readable(sockets: Sequence[socket.socket], timeout_s: float) -> list[socket.socket]:
    """Those that have something to read, or have ended, once there is one."""
    poll, found = select.poll(), {one.fileno(): one for one in sockets}
    for descriptor in found:
        poll.register(descriptor, select.POLLIN)

    return [found[descriptor] for descriptor, _ in poll.poll(1000 * timeout_s)]
