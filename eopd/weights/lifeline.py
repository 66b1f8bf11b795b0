"""Notices at once when a member of a group dies: by an idle TCP connection from every receiver to
the sender.

    receiver, rank 1  ── secret, rank ──▶ ┐
    receiver, rank 2  ── secret, rank ──▶ ├ sender, rank 0        afterwards no byte travels
    a stranger        ── anything ──────▶ ✕ closed, and nobody waited for it

A process that dies, or closes its wire, closes its end of the connection, and the other end sees
that at once. gloo (torch 2.13) alone would notice a member that dies in the middle of a message
only at the time-out. Receivers see the sender only, the sender sees all. So the sender closes its
wire when a receiver is gone, and the other receivers see that. A process that is stopped, or a host
that vanishes, keeps its connection: that costs the time-out of a message.
"""

import hmac
import select
import socket
import struct
import time
from collections.abc import Collection, Sequence
from contextlib import suppress

from eopd.types import WeightTransferError

_RANK = struct.Struct("<I")


class Lifeline:
    """This member's connections. The sender makes it by ``listen``, and calls ``accept``; the others
    by ``connect``. They learn the port from the driver, not where others can write it: who listens
    there is told the secret.

    ``peers`` has what is said of each member when it has left: a sentence, and the ranks at fault.
    """

    def __init__(
        self,
        listener: socket.socket | None,
        peers: dict[socket.socket, tuple[str, Collection[int]]],
        timeout_s: float,
    ) -> None:
        self._listener = listener
        self._peers = peers
        self._timeout_s = timeout_s

    @classmethod
    def listen(cls, address: str, timeout_s: float) -> "Lifeline":
        """Listens on a free port of the sender's ``address``."""
        return cls(socket.create_server((address, 0), backlog=1024), {}, timeout_s)

    @property
    def port(self) -> int:
        """The port that the sender listens on."""
        assert self._listener is not None
        return int(self._listener.getsockname()[1])

    @classmethod
    def connect(
        cls, address: str, port: int, *, rank: int, secret: str, timeout_s: float
    ) -> "Lifeline":
        """Connects a receiver to the sender.

        Raises:
            OSError: the sender cannot be reached.
        """
        sender = socket.create_connection((address, port), timeout_s)
        sender.sendall(secret.encode() + _RANK.pack(rank))

        return cls(None, {sender: (f"the sender at {address} has left", ())}, timeout_s)

    def accept(self, world_size: int, secret: str) -> None:
        """Accept the connections of all receivers (rank 0; others return at once).

        Strangers, and connections that stay silent, delay nobody.

        Raises:
            WeightTransferError: some have not come in time; it names their ``ranks``.
        """
        if self._listener is None:
            return

        deadline = time.monotonic() + self._timeout_s
        missing = set(range(1, world_size))
        # connections whose greeting is not complete, and what has come of it
        greetings: dict[socket.socket, bytes] = {}
        self._listener.setblocking(False)

        try:
            while missing:
                remaining_s = deadline - time.monotonic()
                if remaining_s <= 0:
                    ranks = sorted(missing)
                    raise WeightTransferError(
                        f"ranks {ranks} have not come within {self._timeout_s:g} s", ranks
                    )

                for ready in _readable([self._listener, *greetings], remaining_s):
                    self._serve(ready, greetings, missing, secret)
        finally:
            for peer in greetings:
                peer.close()

            self._listener.close()

    def _serve(
        self,
        ready: socket.socket,
        greetings: dict[socket.socket, bytes],
        missing: set[int],
        secret: str,
    ) -> None:
        """Accept a connection, or read more of a greeting; keep or close a connection whose
        greeting has ended.
        """
        if ready is self._listener:
            peer, _ = self._listener.accept()
            peer.setblocking(False)
            greetings[peer] = b""
            return

        length = len(secret) + _RANK.size

        with suppress(OSError):
            received = ready.recv(length - len(greetings[ready]))
            greetings[ready] += received
            if received and len(greetings[ready]) < length:
                return

        greeting = greetings.pop(ready)
        rank = _RANK.unpack(greeting[-_RANK.size :])[0] if len(greeting) == length else 0
        if rank in missing and hmac.compare_digest(greeting[: len(secret)], secret.encode()):
            missing.remove(rank)
            reason = f"rank {rank} at {ready.getpeername()[0]} has left"
            self._peers[ready] = reason, [rank]
        else:
            ready.close()

    def require_all(self) -> None:
        """Requires that all members are there.

        Raises:
            WeightTransferError: one is gone; it names the ``ranks`` of receivers.
        """
        poll = select.poll()  # select would refuse the high descriptors of a busy engine
        peers = {peer.fileno(): said for peer, said in self._peers.items()}
        if -1 in peers:
            raise WeightTransferError("this member has left")  # closed in another thread

        for descriptor in peers:
            poll.register(descriptor, select.POLLIN | select.POLLRDHUP)

        for descriptor, _ in poll.poll(0):
            raise WeightTransferError(*peers[descriptor])

    def close(self) -> None:
        """Close all connections; the other ends notice."""
        if self._listener is not None:
            self._listener.close()

        for peer in self._peers:
            peer.close()

        self._peers = {}


def _readable(sockets: Sequence[socket.socket], timeout_s: float) -> list[socket.socket]:
    """Waits until some have something to read or have ended, and returns those."""
    poll = select.poll()
    by_descriptor = {listening.fileno(): listening for listening in sockets}
    for descriptor in by_descriptor:
        poll.register(descriptor, select.POLLIN)

    return [by_descriptor[descriptor] for descriptor, _ in poll.poll(1000 * timeout_s)]
