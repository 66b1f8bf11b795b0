"""The weight channel and whoever knocks at it: no seat, no delay, no code without the group's
secret.
"""

import socket
import threading
import time
from dataclasses import replace

import pytest
from torch._C._distributed_c10d import TCPStore

from eopd.types import WeightTransferError
from eopd.weights.lifeline import Lifeline
from eopd.weights.wire import Rendezvous, WireError, open_store, open_wire

SECRET = "0123456789abcdef"


def listener(timeout_s: float = 5.0) -> Lifeline:
    return Lifeline.listen("127.0.0.1", timeout_s)


def member(sender: Lifeline, rank: int) -> Lifeline:
    return Lifeline.connect("127.0.0.1", sender.port, rank=rank, secret=SECRET, timeout_s=5.0)


def knock(sender: Lifeline, said: bytes = b"") -> socket.socket:
    stranger = socket.create_connection(("127.0.0.1", sender.port), 5.0)
    stranger.sendall(said)
    return stranger


def test_the_store_listens_on_the_address_it_is_given_alone():
    store = open_store("127.0.0.1", 5.0)
    with open("/proc/net/tcp") as file, open("/proc/net/tcp6") as file6:
        lines = [line.split() for line in [*file.readlines()[1:], *file6.readlines()[1:]]]

    addresses = [
        line[1]
        for line in lines
        if line[3] == "0A" and int(line[1].rpartition(":")[2], 16) == store.port
    ]
    assert addresses == [f"0100007F:{store.port:04X}"]


def test_whoever_knows_no_secret_gets_no_seat_and_holds_up_nobody():
    sender = listener()
    strangers = [
        knock(sender),  # silent
        knock(sender, b"\x01\x00"),  # half a greeting
        knock(sender, b"\x01\x00\x00\x00"),  # a rank, as one was greeted with once
        knock(sender, b"x" * len(SECRET) + b"\x01\x00\x00\x00"),
        knock(sender, b"GET / HTTP/1.1\r\nHost: eopd\r\n\r\n"),
    ]
    gone = knock(sender, SECRET.encode())
    gone.close()
    members = [member(sender, rank) for rank in (2, 1)]
    started = time.monotonic()
    sender.accept(3, SECRET)
    assert time.monotonic() - started < 1.0
    sender.require_all()
    for stranger in strangers:
        stranger.close()

    sender.require_all()  # a stranger who hangs up is nobody's loss
    members[0].close()
    with pytest.raises(WeightTransferError, match=r"rank 2 at 127\.0\.0\.1 has left") as gone:
        sender.require_all()

    assert gone.value.ranks == (2,)


def test_a_seat_is_given_once():
    sender = listener(timeout_s=0.3)
    member(sender, 1), member(sender, 1), member(sender, 7)

    with pytest.raises(
        WeightTransferError, match=r"ranks \[2\] have not come within 0.3 s"
    ) as missing:
        sender.accept(3, SECRET)

    assert missing.value.ranks == (2,)


def test_the_sender_names_who_has_not_come():
    store, lifeline = open_store("127.0.0.1", 5.0), listener(0.5)
    sender = Rendezvous(
        backend="gloo",
        address="127.0.0.1",
        port=store.port,
        lifeline_port=lifeline.port,
        rank=0,
        world_size=4,
        secret=SECRET,
        connect_timeout_s=0.5,
        timeout_s=5.0,
    )
    with pytest.raises(WireError) as missing:
        open_wire(sender, store=store, lifeline=lifeline)

    assert missing.value.ranks == (1, 2, 3)


def test_what_a_stranger_writes_into_the_store_is_not_read():
    """Keys of a group lie under a prefix that its members compute of their secret."""
    store, lifeline = open_store("127.0.0.1", 5.0), listener(10.0)
    stranger = TCPStore("127.0.0.1", store.port, is_master=False)
    for key in ("eopd/all-here", "eopd/nccl-id", "broadcast_from/0/0"):
        stranger.set(key, "1")

    sender = Rendezvous(
        backend="gloo",
        address="127.0.0.1",
        port=store.port,
        lifeline_port=lifeline.port,
        rank=0,
        world_size=2,
        secret=SECRET,
        connect_timeout_s=10.0,
        timeout_s=10.0,
    )
    wires = []
    joining = threading.Thread(target=lambda: wires.append(open_wire(replace(sender, rank=1))))
    joining.start()
    wires.append(open_wire(sender, store=store, lifeline=lifeline))
    joining.join()
    assert all(wire.is_open for wire in wires)
    assert stranger.get("eopd/all-here") == b"1"
    for wire in wires:
        wire.close()
