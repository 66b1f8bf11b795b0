"""Weights reach every engine that is alive, whoever dies in whichever phase; on fakes."""

import asyncio
from contextlib import nullcontext

import numpy as np
import pytest

from eopd.roles import EngineDownError, LearnerDownError
from eopd.types import PolicyVersion, WeightTransferError
from eopd.weights import sync as module
from eopd.weights.channel import BroadcastChannel
from eopd.weights.probe import Probe
from eopd.weights.sync import WeightSyncError

NEW = PolicyVersion(0, 7)


class FakeSender:
    """Fails ``failures`` transfers, then sends; raises ``error`` for good where there is one."""

    def __init__(self, failures: int = 0, error: Exception | None = None) -> None:
        self.failures, self.error = failures, error
        self.held, self.groups, self.probed = NEW, [], 0
        self.reserved, self.undisturbed = nullcontext(), asyncio.Lock()

    async def version(self):
        return self.held

    async def open(self, engines, secret):
        self.groups.append(engines)
        return [{"rank": rank} for rank in range(engines)]

    async def accept(self):
        pass

    async def send(self):
        if self.error is not None:
            raise self.error

        self.failures -= 1
        if self.failures >= 0:
            raise WeightTransferError("connection closed by peer")

        return 100

    async def probe(self, token_ids):
        self.probed += 1
        return np.zeros(len(token_ids) - 1, np.float32)


class FakeEngine:
    """``dies_in`` is the call it dies in; ``wrong`` labels the weights it says it serves. The first
    ``bad_hashes`` transfers do not arrive whole, the first ``bad_loads`` are loaded wrong.
    """

    def __init__(
        self,
        dies_in: str = "",
        wrong: PolicyVersion | None = None,
        bad_hashes: int = 0,
        bad_loads: int = 0,
    ) -> None:
        self.dies_in = dies_in
        self.wrong = wrong
        self.bad_hashes = bad_hashes
        self.bad_loads = bad_loads
        self.dead = False
        self.serves = PolicyVersion(0, 0)
        self.calls = []

    async def _call(self, name):
        self.calls.append(name)
        self.dead = self.dead or name == self.dies_in
        if self.dead:
            raise EngineDownError(f"died in {name}")

    async def connect_weights(self, init_info):
        await self._call("connect")

    async def begin_weights(self):
        await self._call("receive")

    async def check_weights(self):
        await self._call("check")
        self.bad_hashes -= 1
        if self.bad_hashes >= 0:
            raise WeightTransferError("bucket 2 of 3 is not what was sent")

    async def probe(self, token_ids):
        await self._call("probe")
        self.bad_loads -= 1
        return np.full(
            len(token_ids) - 1,
            -1.0 if self.bad_loads >= 0 else 0.0,
            np.float32,
        )

    async def install_weights(self, version):
        await self._call("install")
        self.serves = self.wrong or version
        return 0.25

    async def version(self):
        await self._call("version")
        return self.serves


def channel_of(sender, *engines, lost=None, every=0):
    told = [] if lost is None else lost
    return BroadcastChannel(
        sender,
        dict(enumerate(engines)),
        lose=lambda number, reason: told.append((number, reason)),
        probe=Probe(token_ids=np.arange(5, dtype=np.int32), dtype="float32", every=every),
        connect_timeout_s=0.2,
        timeout_s=0.2,
    )


async def test_nothing_that_the_learner_works_on_delays_a_transfer():
    """Engines wait for each of its calls with a limit, and a part of a batch may take longer."""

    class Watching(FakeEngine):
        async def _call(self, name):
            await super()._call(name)
            held.append((name, sender.undisturbed.locked()))

    held, sent = [], []
    sender = FakeSender()
    channel = channel_of(sender, Watching())
    await sender.undisturbed.acquire()  # a part is under way
    joining = asyncio.create_task(
        channel.publish(NEW, lambda: sent.append(sender.undisturbed.locked()))
    )
    await asyncio.sleep(0.01)
    assert held == []
    sender.undisturbed.release()
    await joining
    assert held[:4] == [("connect", True), ("receive", True), ("check", False), ("install", False)]
    assert sent == [True], "whoever goes on then waits for a moment"


async def test_the_group_is_built_once_and_every_engine_serves_the_version():
    sender = FakeSender()
    engines = [FakeEngine(), FakeEngine()]
    channel = channel_of(sender, *engines)
    for _ in range(2):
        stats = await channel.publish(NEW)

    assert stats.version == NEW
    assert stats.num_bytes == 100
    assert stats.pause_s == 0.25
    assert sender.groups == [2]
    assert channel.num_failures == 0
    assert [engine.serves for engine in engines] == [NEW, NEW]


@pytest.mark.parametrize("phase", ["connect", "receive", "check"])
async def test_an_engine_that_dies_in_phase_one_is_left_out(phase):
    sender, lost = FakeSender(), []
    engines = [FakeEngine(), FakeEngine(dies_in=phase), FakeEngine()]
    channel = channel_of(sender, *engines, lost=lost)
    await channel.publish(NEW)
    assert [number for number, _ in lost] == [1]
    assert f"died in {phase}" in lost[0][1]
    assert sender.groups == [3, 2]
    assert [engine.serves.step for engine in engines] == [7, 0, 7]
    assert channel.num_failures == 1


async def test_an_engine_that_dies_while_it_loads_is_condemned():
    sender, lost = FakeSender(), []
    engines = [FakeEngine(dies_in="install"), FakeEngine()]
    channel = channel_of(sender, *engines, lost=lost)
    await channel.publish(NEW)
    assert lost == [(0, "installing weights failed: died in install")]
    assert engines[1].serves == NEW
    assert sender.groups == [2]
    await channel.publish(NEW)
    assert sender.groups == [2, 1]


async def test_an_engine_that_serves_another_version_is_condemned():
    lost = []
    await channel_of(
        FakeSender(),
        FakeEngine(wrong=PolicyVersion(0, 6)),
        lost=lost,
    ).publish(NEW)
    assert lost == [(0, "installing weights failed: it serves 0.6 after 0.7 was installed")]


async def test_an_engine_that_hangs_costs_one_time_out(monkeypatch):
    monkeypatch.setattr(module, "PING_S", 0.05)

    class Stopped(FakeEngine):
        async def _call(self, name):
            await asyncio.sleep(3600)

    lost, other = [], FakeEngine()
    channel = channel_of(FakeSender(), Stopped(), other, lost=lost)
    async with asyncio.timeout(2.0):
        await channel.publish(NEW)

    assert [number for number, _ in lost] == [0]
    assert other.serves == NEW


async def test_the_error_of_a_worker_is_told_by_its_cause_in_one_line(monkeypatch):
    """Ray makes the message of such an error from the worker's traceback."""
    monkeypatch.setattr(module, "PING_S", 0.05)

    class Stopped(FakeEngine):
        async def version(self):
            await asyncio.sleep(3600)

    class FromWorker(WeightTransferError):
        cause = WeightTransferError("the other side is gone\nand more")

    lost, sender = [], FakeSender(error=FromWorker("ray::LearnerActor.send_weights() (pid=1)"))
    with pytest.raises(WeightSyncError):
        await channel_of(sender, Stopped(), FakeEngine(), lost=lost).publish(NEW)

    told = "it does not answer (after a weight transfer failed: the other side is gone)"
    assert lost[0] == (0, told)


async def test_a_failed_transfer_is_sent_again_and_not_for_ever():
    sender, engine = FakeSender(failures=2), FakeEngine()
    channel = channel_of(sender, engine)
    await channel.publish(NEW)
    assert engine.serves == NEW
    assert len(sender.groups) == 3
    assert channel.num_failures == 2
    broken = channel_of(FakeSender(failures=1000), FakeEngine())

    with pytest.raises(
        WeightSyncError, match=r"5 transfers of 0\.7 failed, last: connection closed by peer"
    ):
        await broken.publish(NEW)


async def test_a_lost_learner_is_not_the_engines_fault():
    lost = []
    channel = channel_of(
        FakeSender(error=LearnerDownError("rank 1 died")),
        FakeEngine(),
        lost=lost,
    )
    with pytest.raises(LearnerDownError, match="rank 1"):
        await channel.publish(NEW)

    assert lost == []


async def test_a_newcomer_is_brought_to_the_learner_s_version():
    sender = FakeSender()
    old = FakeEngine()
    new = FakeEngine()
    channel = channel_of(sender, old)
    await channel.publish(NEW)
    sender.held = PolicyVersion(0, 8)
    await channel.join(1, new)
    assert (old.serves, new.serves) == (NEW, sender.held)
    assert sender.groups == [1, 1]
    await channel.publish(sender.held)
    assert old.serves == sender.held
    assert sender.groups[-1] == 2


async def test_a_newcomer_that_dies_is_told_to_who_started_it():
    lost, old = [], FakeEngine()
    channel = channel_of(FakeSender(), old, lost=lost)
    with pytest.raises(EngineDownError, match="rollout engine 1 did not take the weights"):
        await channel.join(1, FakeEngine(dies_in="receive"))

    await channel.publish(NEW)
    assert lost == [] and old.serves == NEW


async def test_without_engines_a_version_is_published_at_once():
    channel = channel_of(FakeSender(), FakeEngine(dies_in="receive"))
    new = FakeEngine()
    assert (await channel.publish(NEW)).num_bytes == 0
    await channel.join(0, new)
    assert new.serves == NEW


async def test_an_engine_that_left_takes_no_part():
    sender = FakeSender()
    gone = FakeEngine()
    here = FakeEngine()
    channel = channel_of(sender, gone, here)
    await channel.publish(NEW)
    await channel.drop(0)
    await channel.publish(NEW)
    channel.disconnect()
    await channel.publish(NEW)
    assert sender.groups == [2, 1, 1]
    assert gone.calls.count("receive") == 1


@pytest.mark.parametrize("moment", ["open", "accept"])
async def test_leaving_while_the_group_is_built_costs_one_round(moment, monkeypatch):
    sender = FakeSender()
    engines = [FakeEngine(), FakeEngine()]
    channel = channel_of(sender, *engines)
    before = getattr(sender, moment)

    async def and_one_leaves(*arguments):
        await channel.drop(0)
        return await before(*arguments)

    monkeypatch.setattr(sender, moment, and_one_leaves)
    await channel.publish(NEW)
    assert sender.groups == [2, 1]
    assert channel.num_failures == 1
    assert [engine.serves.step for engine in engines] == [0, 7]


async def test_publishing_what_the_learner_does_not_hold_is_an_error():
    with pytest.raises(WeightSyncError, match=r"0\.9 was to be published, the learner holds 0\.7"):
        await channel_of(FakeSender(), FakeEngine()).publish(PolicyVersion(0, 9))


@pytest.mark.parametrize("fault", ["bad_hashes", "bad_loads"])
async def test_wrong_weights_are_sent_once_more(fault):
    sender = FakeSender()
    lost = []
    engine = FakeEngine(**{fault: 1})
    other = FakeEngine()
    channel = channel_of(sender, engine, other, lost=lost, every=1)
    stats = await channel.publish(NEW)
    assert lost == []
    assert engine.serves == other.serves == NEW
    assert stats.probe_nats == 0.0
    assert channel.num_failures == 1
    assert other.calls.count("install") == (1 if fault == "bad_hashes" else 2)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("bad_hashes", "it did not receive the weights: bucket 2 of 3"),
        ("bad_loads", "the engine's log-probabilities of the probe are 1 nats"),
    ],
)
async def test_an_engine_that_is_wrong_twice_is_condemned(fault, reason):
    sender = FakeSender()
    lost = []
    other = FakeEngine()
    channel = channel_of(sender, FakeEngine(**{fault: 2}), other, lost=lost, every=1)
    await channel.publish(NEW)
    ((number, told),) = lost
    assert number == 0
    assert told.startswith(f"twice with the same weights: {reason}")
    assert other.serves == NEW
    assert sender.groups[-1] == (1 if fault == "bad_hashes" else 2)
    lost.clear()
    await channel.publish(NEW)
    assert lost == [] and sender.groups[-1] == 1


async def test_an_engine_that_does_not_answer_the_probe_is_condemned():
    lost = []
    await channel_of(
        FakeSender(),
        FakeEngine(dies_in="probe"),
        lost=lost,
        every=1,
    ).publish(NEW)
    assert lost == [(0, "it did not answer the probe: died in probe")]


async def test_every_so_many_syncs_are_probed_and_so_is_every_newcomer():
    sender = FakeSender()
    channel = channel_of(sender, FakeEngine(), every=3)
    stats = [await channel.publish(NEW) for _ in range(7)]
    assert [one.probe_nats for one in stats] == [0.0, None, None, 0.0, None, None, 0.0]
    await channel.join(1, FakeEngine())
    assert sender.probed == 4
    never = FakeSender()
    await channel_of(never, FakeEngine(), every=0).publish(NEW)
    assert never.probed == 0


class Slow(FakeEngine):
    """Waits in the call it is told to, until ``gate`` opens; ``dies`` then."""

    def __init__(self, waits_in: str, dies: bool = False) -> None:
        super().__init__()
        self.waits_in = waits_in
        self.dies = dies
        self.reached = asyncio.Event()
        self.gate = asyncio.Event()

    async def _call(self, name):
        if name == self.waits_in:
            self.reached.set()
            await self.gate.wait()
            self.dead = self.dies

        await super()._call(name)


async def test_a_well_engine_parts_when_no_transfer_is_under_way():
    engine, lost = Slow("install"), []
    channel = channel_of(FakeSender(), engine, FakeEngine(), lost=lost)
    publishing = asyncio.create_task(channel.publish(NEW))
    await engine.reached.wait()
    parting = asyncio.create_task(channel.remove(0))
    await asyncio.sleep(0.01)
    assert not parting.done()
    engine.gate.set()
    await publishing
    await parting
    assert engine.serves == NEW
    assert lost == []
    assert channel.num_failures == 0


async def test_an_engine_that_was_taken_out_is_not_condemned_again():
    engine, lost = Slow("install", dies=True), []
    channel = channel_of(FakeSender(), engine, FakeEngine(), lost=lost)
    publishing = asyncio.create_task(channel.publish(NEW))
    await engine.reached.wait()
    await channel.drop(0)
    engine.gate.set()
    await publishing
    assert lost == []


async def test_a_newcomer_that_met_a_lost_learner_is_left_out_again():
    sender, lost = FakeSender(), []
    channel = channel_of(sender, FakeEngine(), lost=lost)
    await channel.publish(NEW)
    sender.error = LearnerDownError("rank 1 died")
    with pytest.raises(LearnerDownError):
        await channel.join(1, FakeEngine())

    sender.error = None
    await channel.publish(NEW)
    assert lost == [] and sender.groups[-1] == 1


async def test_a_newcomer_s_word_of_a_lost_learner_stands_until_there_is_another():
    sender = FakeSender(error=LearnerDownError("rank 1 died"))
    channel = channel_of(sender)
    with pytest.raises(LearnerDownError):
        await channel.join(1, FakeEngine())

    with pytest.raises(LearnerDownError, match="rank 1 died"):
        await asyncio.wait_for(channel.sender_lost(), 5.0)

    channel.disconnect()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(channel.sender_lost(), 0.01)


async def test_an_engine_without_a_seat_for_the_probe_stays(monkeypatch):
    monkeypatch.setattr(module, "PROBE_S", 0.02)
    lost = []
    stats = await channel_of(FakeSender(), Slow("probe"), lost=lost, every=1).publish(NEW)
    assert lost == [] and stats.probe_nats is None
    stats = await channel_of(
        FakeSender(),
        Slow("probe"),
        FakeEngine(),
        lost=lost,
        every=1,
    ).publish(NEW)
    assert lost == [] and stats.probe_nats == 0.0


async def test_newcomers_share_one_transfer_of_their_own():
    sender = FakeSender()
    old = [FakeEngine() for _ in range(56)]
    channel = channel_of(sender, *old)
    await channel.publish(NEW)
    before = [list(engine.calls) for engine in old]
    new = [FakeEngine() for _ in range(8)]
    first = Slow("connect")
    joins = [asyncio.create_task(channel.join(56, first))]
    await first.reached.wait()
    joins += [
        asyncio.create_task(channel.join(57 + index, engine)) for index, engine in enumerate(new)
    ]
    await asyncio.sleep(0.01)
    first.gate.set()
    await asyncio.gather(*joins)
    assert sender.groups[1:] == [1, 8]
    assert [engine.calls for engine in old] == before
    assert {engine.serves for engine in new} == {NEW}
    await channel.publish(NEW)
    assert sender.groups[-1] == 65


async def test_a_newcomer_that_fails_costs_the_others_nothing():
    channel = channel_of(FakeSender(), FakeEngine())
    gate = Slow("connect")
    first = asyncio.create_task(channel.join(1, gate))
    await gate.reached.wait()
    well, ill = FakeEngine(), FakeEngine(dies_in="install")
    joins = asyncio.gather(
        channel.join(2, well),
        channel.join(3, ill),
        return_exceptions=True,
    )
    await asyncio.sleep(0.01)
    gate.gate.set()
    await first
    joined, refused = await joins
    assert joined is None and well.serves == NEW
    assert isinstance(refused, EngineDownError)
    assert "installing weights failed: died in install" in str(refused)


class Unconnectable(FakeEngine):
    """Answers, and cannot connect, for a reason of its own."""

    async def connect_weights(self, init_info):
        await self._call("connect")
        raise WeightTransferError("NCCL error: out of memory")


class WaitsForAll(FakeSender):
    """Accepts for a while, and says who has not come, as the sender's store does."""

    def __init__(self, *missing: int) -> None:
        super().__init__()
        self.missing = missing

    async def accept(self):
        await asyncio.sleep(0.02)
        if self.missing and self.groups[-1] == 64:
            raise WeightTransferError("ranks have not come", self.missing)


@pytest.mark.parametrize("fault", ["connect", "silent"])
async def test_one_of_many_engines_that_cannot_join_is_lost(
    fault,
):
    engines = [FakeEngine() for _ in range(64)]
    lost = []
    sender = WaitsForAll(1 + 5)
    if fault == "connect":
        engines[5], sender.missing = Unconnectable(), ()

    channel = channel_of(sender, *engines, lost=lost)
    await channel.publish(NEW)
    ((number, reason),) = lost
    assert number == 5
    assert ("could not connect" if fault == "connect" else "did not connect") in reason
    assert [engine.serves for engine in engines].count(NEW) == 63
    assert len(sender.groups) == 3


async def test_one_that_leaves_in_the_middle_of_a_transfer_twice_is_lost():
    class Left(FakeSender):
        async def send(self):
            if self.groups[-1] == 3:
                raise WeightTransferError("rank 2 at host has left", [2])

            return 100

    lost, sender = [], Left()
    channel = channel_of(sender, *(FakeEngine() for _ in range(3)), lost=lost)
    await channel.publish(NEW)
    ((number, reason),) = lost
    assert number == 1
    assert reason.startswith("twice with the same weights: it left a weight transfer: rank 2")
    assert sender.groups == [3, 3, 2]


async def test_a_group_has_a_secret_of_its_own():
    secrets = []

    class Noting(FakeSender):
        async def open(self, engines, secret):
            secrets.append(secret)
            return await super().open(engines, secret)

    channel = channel_of(Noting(), FakeEngine())
    await channel.publish(NEW)
    channel.disconnect()
    await channel.publish(NEW)
    assert len(set(secrets)) == 2
    assert min(map(len, secrets)) >= 32


async def test_the_learner_is_needed_no_more_once_it_has_sent():
    """It is asked for the probe before, so that it may train while the engines load."""
    happened = []

    class Sender(FakeSender):
        async def send(self):
            happened.append("send")
            return await super().send()

        async def probe(self, token_ids):
            happened.append("probe")
            return await super().probe(token_ids)

    class Engine(FakeEngine):
        async def _call(self, name):
            happened.append(name)
            await super()._call(name)

    channel = channel_of(Sender(failures=1), Engine(), every=1)
    stats = await channel.publish(NEW, lambda: happened.append("sent"))
    assert stats.probe_nats == 0.0
    assert happened[0] == "probe"
    assert happened.count("sent") == 1, "the first transfer failed"
    after = happened[happened.index("sent") + 1 :]
    assert after == ["check", "install", "version", "probe"], "all of them calls to the engine"


async def test_an_engine_that_is_dropped_while_weights_are_sent_costs_that_transfer():
    """Its fleet may hear of its death before the sender names its rank."""

    class Sender(FakeSender):
        async def send(self):
            if self.failures:
                self.failures = 0
                await channel.drop(0)
                raise WeightTransferError("rank 1 at 127.0.0.1 has left", [1])

            return 100

    engines, lost = [FakeEngine(), FakeEngine()], []
    channel = channel_of(Sender(failures=1), *engines, lost=lost)
    stats = await channel.publish(NEW)
    assert stats.num_bytes == 100 and lost == []
    assert [engine.serves for engine in engines] == [PolicyVersion(0, 0), NEW]
    assert channel.num_failures == 1


async def test_the_last_words_of_an_engine_do_not_put_out_the_one_that_replaces_it():
    class Slow(FakeEngine):
        async def install_weights(self, version):
            installing.set()
            await asyncio.sleep(0.05)
            raise EngineDownError("killed")

    installing, lost = asyncio.Event(), []
    channel = channel_of(FakeSender(), FakeEngine(), Slow(), lost=lost)
    publishing = asyncio.create_task(channel.publish(NEW))
    await installing.wait()
    await channel.drop(1)
    another = FakeEngine()
    await asyncio.gather(publishing, channel.join(1, another))
    assert (another.serves, lost) == (NEW, [])
