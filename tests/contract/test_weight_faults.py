"""A receiver that dies or stalls, in processes of their own, over sockets and over shared memory:
all are told, and those alive go on.

Where the others must be told at once, time-outs are an hour, and the test's own limit is what a
slow answer meets.
"""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import pytest
import torch
from processes import FORKED

from eopd.types import WeightTransferError
from eopd.weights import wire
from eopd.weights.layout import ParameterMeta
from eopd.weights.transfer import InitInfo, WeightReceiver, WeightSender
from eopd.weights.wire import Backend, WireError

# 16 MiB: more than sockets take, so that a message meets the fault half-way
NUM_BUCKETS, BUCKET_FLOATS = 6, 4 << 20
HOUR = 3600.0


class Source:
    """A ``ModelSource`` of constants, with something that happens before one bucket."""

    scale = None

    def __init__(self) -> None:
        self.value = 0.0
        self.at_bucket = -1
        self.happens = lambda: None

    def metadata(self):
        return [
            ParameterMeta(
                f"p{i}",
                "float32",
                (BUCKET_FLOATS,),
            )
            for i in range(NUM_BUCKETS)
        ]

    def gather(self, bucket):
        index = int(bucket[0].name[1:])
        if index == self.at_bucket:
            self.at_bucket = -1
            self.happens()

        return [torch.full((BUCKET_FLOATS,), self.value + index)]


def receive(pipe: Connection) -> None:
    """A receiver's process: does as it is told, and answers with what came of it."""
    torch.set_num_threads(1)
    pipe.send("up")
    receiver: WeightReceiver | None = None

    while True:
        order, argument = pipe.recv()
        try:
            if order == "connect":
                receiver = WeightReceiver(InitInfo(**argument))
                answer = "joined"
            elif order == "start":
                answer = receiver.start() or "started"
            else:
                receiver.check()
                answer = [float(tensor.mean()) for _, tensor in receiver.take()]
        except WeightTransferError as error:
            answer = f"{type(error).__name__}: {error}"

        pipe.send(answer)


class Gang:
    """Receivers in processes of their own."""

    def __init__(self, num: int) -> None:
        self.members: list[tuple[BaseProcess, Connection]] = []
        for _ in range(num):
            ours, theirs = FORKED.Pipe()
            process = FORKED.Process(target=receive, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self.members.append((process, ours))

        assert [pipe.recv() for _, pipe in self.members] == ["up"] * num

    def tell(self, order: str, arguments=None):
        arguments = arguments or [None] * len(self.members)
        for (_, pipe), argument in zip(self.members, arguments, strict=True):
            pipe.send((order, argument))

        return lambda: [pipe.recv() for _, pipe in self.members]

    def connect(self, sender: WeightSender) -> None:
        answers = self.tell("connect", sender.open(len(self.members), "secret"))
        sender.accept()
        assert answers() == ["joined"] * len(self.members)

    def publish(self, sender: WeightSender) -> int:
        assert self.tell("start")() == ["started"] * len(self.members)
        return sender.send()

    def remove(self, victim: int, how: signal.Signals) -> int:
        """Send a signal, and let go of that member; returns its process id."""
        process, _ = self.members.pop(victim)
        os.kill(process.pid, how)
        if how == signal.SIGKILL:
            process.join()

        return process.pid


@contextmanager
def gang(
    num: int, timeout_s: float, backend: Backend = "gloo"
) -> Iterator[tuple[Gang, WeightSender, Source]]:
    source = Source()
    sender = WeightSender(
        source,
        rank=0,
        backend=backend,
        address="127.0.0.1",
        bucket_bytes=4 * BUCKET_FLOATS,
        timeout_s=timeout_s,
        connect_timeout_s=60.0,
    )
    them = Gang(num)

    try:
        yield them, sender, source
    finally:
        sender.close()
        for process, _ in them.members:
            process.kill()


def assert_publishes(them: Gang, sender: WeightSender, source: Source, value: float) -> None:
    source.value = value
    assert them.publish(sender) == NUM_BUCKETS * BUCKET_FLOATS * 4
    expected = [value + index for index in range(NUM_BUCKETS)]
    assert them.tell("take")() == [expected] * len(them.members)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("backend", "victim", "at_bucket"),
    [
        # each has another place in the tree that a broadcast of gloo goes down
        ("gloo", 0, 3),
        ("gloo", 1, 0),
        ("gloo", 2, 3),
        ("shared", 0, 0),
        ("shared", 2, 3),
    ],
)
def test_a_receiver_killed_in_a_transfer_fails_it_for_all_at_once(backend, victim, at_bucket):
    with gang(3, HOUR, backend) as (them, sender, source):
        them.connect(sender)
        assert_publishes(them, sender, source, 1.0)
        source.at_bucket = at_bucket
        source.happens = lambda: them.remove(victim, signal.SIGKILL)
        with pytest.raises(WireError):
            them.publish(sender)

        for answer in them.tell("take")():
            assert answer.startswith("WeightTransferError: weight transfer failed"), answer

        assert all("connect again" in answer for answer in them.tell("start")())
        with pytest.raises(WireError, match="no group"):
            sender.send()

        them.connect(sender)
        assert_publishes(them, sender, source, 2.0)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("backend", "victim"), [("gloo", 0), ("gloo", 2), ("shared", 1)])
def test_a_stalled_receiver_costs_one_time_out(backend, victim):
    with gang(3, 3.0, backend) as (them, sender, source):
        them.connect(sender)
        stalled: list[int] = []
        source.at_bucket = 3
        source.happens = lambda: stalled.append(them.remove(victim, signal.SIGSTOP))

        try:
            with pytest.raises(WireError):
                them.publish(sender)

            for answer in them.tell("take")():
                assert answer.startswith("WeightTransferError: weight transfer failed"), answer

            them.connect(sender)
            assert_publishes(them, sender, source, 2.0)
        finally:
            os.kill(stalled[0], signal.SIGKILL)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("backend", ["gloo", "shared"])
def test_a_group_is_built_again_while_an_old_transfer_waits(backend):
    """The learner gives up a transfer that it never sent: its own leaving ends the receivers'
    threads.
    """
    with gang(2, HOUR, backend) as (them, sender, source):
        them.connect(sender)
        them.tell("start")()
        them.connect(sender)
        assert_publishes(them, sender, source, 3.0)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("backend", ["gloo", "shared"])
def test_an_engine_killed_between_two_transfers_fails_the_next(backend):
    with gang(2, HOUR, backend) as (them, sender, source):
        them.connect(sender)
        assert_publishes(them, sender, source, 1.0)
        them.remove(0, signal.SIGKILL)
        with pytest.raises(WireError):
            them.publish(sender)

        them.connect(sender)
        assert_publishes(them, sender, source, 2.0)


@pytest.mark.timeout(120)
def test_who_has_left_is_named_also_when_gloo_notices_first(monkeypatch):
    with gang(1, timeout_s=HOUR) as (them, sender, source):
        them.connect(sender)
        source.at_bucket = 3
        source.happens = lambda: them.remove(0, signal.SIGKILL)
        monkeypatch.setattr(wire, "POLL_S", 0.5)  # gloo has failed before the next look
        assert them.tell("start")() == ["started"]
        with pytest.raises(WireError, match=r"rank 1 at .* has left") as caught:
            sender.send()

        assert list(caught.value.ranks) == [1]


@pytest.mark.timeout(120)
def test_a_group_is_built_without_one_that_never_joins():
    with gang(2, timeout_s=HOUR) as (them, sender, source):
        sender._connect_timeout_s = 2.0
        answers = them.tell("connect", sender.open(3, "secret")[:2])
        with pytest.raises(WireError, match="as rank 0 of 4"), ThreadPoolExecutor() as pool:
            pool.submit(sender.accept).result()

        assert all(
            answer.startswith("WireError: weight transfer: no group at") for answer in answers()
        )
        them.connect(sender)
        assert_publishes(them, sender, source, 1.0)


@pytest.mark.timeout(120)
def test_all_receivers_on_the_host_read_the_senders_memory(caplog):
    with gang(2, HOUR, "auto") as (them, sender, source), caplog.at_level("INFO"):
        them.connect(sender)
        assert_publishes(them, sender, source, 1.0)
        assert_publishes(them, sender, source, 2.0)

    assert "weights travel by shared to 2 engines" in caplog.text


@pytest.mark.timeout(120)
def test_weights_go_over_sockets_where_one_receiver_does_not_see_the_memory(caplog):
    with gang(2, HOUR, "auto") as (them, sender, source), caplog.at_level("INFO"):
        here, elsewhere = sender.open(2, "secret")
        answers = them.tell("connect", [here, {**elsewhere, "memory": "/proc/self/fd/9999"}])
        sender.accept()
        assert answers() == ["joined"] * 2
        assert_publishes(them, sender, source, 1.0)

    assert "weights travel by gloo to 2 engines" in caplog.text


@pytest.mark.timeout(120)
def test_shared_memory_that_was_asked_for_is_refused_where_one_does_not_see_it():
    with gang(2, HOUR, "shared") as (them, sender, source):
        sender._connect_timeout_s = 2.0
        here, elsewhere = sender.open(2, "secret")
        answers = them.tell("connect", [here, {**elsewhere, "memory": "/proc/self/fd/9999"}])
        with pytest.raises(WireError, match=r"ranks \[2\] do not see the memory") as refused:
            sender.accept()

        assert list(refused.value.ranks) == [2]
        assert all(
            answer.startswith("WireError: weight transfer: no group") for answer in answers()
        )
        them.connect(sender)
        assert_publishes(them, sender, source, 1.0)
