"""How fast one gigabyte of weights goes from a sender to a receiver, beside bare broadcasts of gloo.

    bare    gloo's broadcast of the same bytes, in messages of the same size, and nothing else
    sent    ``WeightSender.send``: gathered, packed, hashed, sent, hashed again, and all arrived

Both take turns between the same two processes, over TCP.
"""

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from statistics import median

import torch

from eopd.weights.layout import Bucket, ParameterMeta
from eopd.weights.lifeline import Lifeline
from eopd.weights.transfer import InitInfo, WeightReceiver, WeightSender
from eopd.weights.wire import GlooWire, open_store, open_wire

FLOATS = 1 << 20  # 4 MiB, a layer of a small model
BAR = 0.6  # of the bytes a second of a bare broadcast, at least


class Weights:
    """A ``ModelSource`` of equal tensors."""

    scale = None

    def __init__(self, megabytes: int) -> None:
        names = [f"layer.{number}" for number in range(megabytes // 4)]
        self._tensors = {name: torch.full((FLOATS,), 1.0) for name in names}

    def metadata(self) -> Sequence[ParameterMeta]:
        return [ParameterMeta.of(name, t, t.shape) for name, t in self._tensors.items()]

    def gather(self, bucket: Bucket) -> Sequence[torch.Tensor]:
        return [self._tensors[parameter.name] for parameter in bucket]


def receive(pipe: Connection, info: InitInfo, bare: InitInfo, sizes: Sequence[int]) -> None:
    """Receives by turns, as it is told."""
    torch.set_num_threads(1)
    receiver, wire = WeightReceiver(info), open_wire(bare)
    messages = [torch.empty(size, dtype=torch.uint8) for size in sizes]
    pipe.send("joined")

    while (kind := pipe.recv()) != "end":
        pipe.send("ready")
        if kind == "bare":
            broadcast(wire, messages)
        else:
            receiver.start()
            assert len(list(receiver.take())) == sum(map(len, info.buckets))


def broadcast(wire: GlooWire, messages: Sequence[torch.Tensor]) -> None:
    for message_B in messages:
        wire.broadcast(message_B)

    wire.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    source = Weights(options.megabytes)
    sender = WeightSender(
        source,
        rank=0,
        backend="gloo",
        address="127.0.0.1",
        bucket_bytes=64 << 20,
        connect_timeout_s=60.0,
        timeout_s=60.0,
    )
    (fields,) = sender.open(1, "of weights")
    info = InitInfo(**fields)
    store, lifeline = open_store("127.0.0.1", 60.0), Lifeline.listen("127.0.0.1", 60.0)
    ports = {"port": store.port, "lifeline_port": lifeline.port, "secret": "of nothing"}
    bare = InitInfo(**fields | ports)
    sizes = sender._sizes

    ours, theirs = multiprocessing.Pipe()
    receiver = multiprocessing.get_context("fork").Process(
        target=receive, args=(theirs, info, bare, sizes), daemon=True
    )
    receiver.start()
    sender.accept()
    wire = open_wire(InitInfo(**fields | ports | {"rank": 0}), store=store, lifeline=lifeline)
    messages = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
    assert ours.recv() == "joined"

    def seconds(kind: str, send: Callable[[], object]) -> float:
        ours.send(kind)
        assert ours.recv() == "ready"
        time.sleep(0.1)
        started = time.monotonic()
        send()
        return time.monotonic() - started

    taken: dict[str, list[float]] = {"bare": [], "sent": []}
    for number in range(1 + options.rounds):
        for kind, send in (("bare", lambda: broadcast(wire, messages)), ("sent", sender.send)):
            spent = seconds(kind, send)
            if number:  # the first of each allocates
                taken[kind].append(spent)

    ours.send("end")
    gigabytes = sum(sizes) / 1e9
    for kind, spent in taken.items():
        say(f"{kind}: {median(spent):.2f} s, {gigabytes / median(spent):.2f} GB/s")

    ratio = median(taken["bare"]) / median(taken["sent"])
    say(f"{ratio:.2f} of the bytes a second of bare broadcasts (at least {BAR:g})")
    sys.exit(0 if ratio >= BAR else "MISS")


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
