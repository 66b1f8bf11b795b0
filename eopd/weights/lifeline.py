"""Who is still there: one idle TCP connection from every receiver to the sender, beside the wire.

No byte travels after the handshake. A process that dies, or closes its wire, closes its end, and the other end sees
that at once; gloo (torch 2.13) does not notice a member that dies in the middle of a message before the time-out.
Receivers see only the sender, the sender sees all: it leaves when one has left, and so tells the others. A member that
is stopped, or a host that vanishes, keeps its connection: that costs the time-out of a message.
"""

import select
import socket
import struct

from torch._C._distributed_c10d import TCPStore

KEY = "eopd/lifeline"
_RANK = struct.Struct("<I")


class Lifeline:
    """This member's connections. Make it with ``lay`` before the group is joined, ``fasten`` it afterwards."""

    def __init__(self, listener: socket.socket | None, peers: dict[socket.socket, str], timeout_s: float) -> None:
        self._listener = listener
        self._peers = peers
        self._timeout_s = timeout_s

    @classmethod
    def lay(cls, store: TCPStore, *, address: str, rank: int, timeout_s: float) -> "Lifeline":
        """Listen on the sender's ``address`` (rank 0), or connect to it; the port is told through the store.

        Raises:
            OSError: the sender cannot be reached.
            RuntimeError: the store does not answer.
        """
        if rank == 0:
            listener = socket.create_server((address, 0), backlog=1024)
            store.set(KEY, str(listener.getsockname()[1]))
            return cls(listener, {}, timeout_s)
        sender = socket.create_connection((address, int(store.get(KEY))), timeout_s)
        sender.sendall(_RANK.pack(rank))
        return cls(None, {sender: f"the sender at {address} has left"}, timeout_s)

    def fasten(self, world_size: int) -> None:
        """Rank 0: take up the connections of all others, who have joined and so have made them."""
        if self._listener is None:
            return
        self._listener.settimeout(self._timeout_s)
        while len(self._peers) < world_size - 1:
            peer, (host, *_) = self._listener.accept()
            peer.settimeout(self._timeout_s)
            greeting = peer.recv(_RANK.size, socket.MSG_WAITALL)
            if len(greeting) == _RANK.size:  # else a stranger who knocked at the port
                self._peers[peer] = f"rank {_RANK.unpack(greeting)[0]} at {host} has left"
        self._listener.close()

    def lost(self) -> str | None:
        """Who has left, in words; None while all are there."""
        poll = select.poll()  # select would refuse the high descriptors of a busy engine
        peers = {peer.fileno(): words for peer, words in self._peers.items()}
        if -1 in peers:
            return "this member has left"  # closed in another thread
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
