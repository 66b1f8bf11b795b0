"""Ranks that are lost with their node: what a peer says of it comes before Ray's news."""

import asyncio
from contextlib import asynccontextmanager, contextmanager
from types import SimpleNamespace

import fakes
import pytest
from ray.exceptions import (
    ActorDiedError,
    ActorUnschedulableError,
    ObjectFetchTimedOutError,
    RayTaskError,
)

from eopd.config import ConfigError, load_config
from eopd.packing import pack_batch
from eopd.roles import LearnerDownError
from eopd.run import lock
from eopd.run.lock import Holder
from eopd.runtime import actors, learner_actor, supervisor
from eopd.runtime import gang as module
from eopd.runtime.gang import LearnerGang
from eopd.runtime.learner_actor import LearnerActor
from eopd.types import Stored

pytestmark = pytest.mark.virtual_time


class Method:
    def __init__(self, call) -> None:
        self.remote = call


class Rank:
    """``step`` raises what a rank says whose peer is gone; ``ping`` is answered, or dies,
    after a while.
    """

    def __init__(self, *, lost_after_s: float | None = None, busy_s: float = 0.0) -> None:
        self.lost_after_s = lost_after_s
        self.busy_s = busy_s
        self.step = Method(self._step)
        self.ping = Method(self._ping)

    async def _step(self):
        if self.lost_after_s is not None:
            await asyncio.sleep(self.lost_after_s)
            raise ActorDiedError

        await asyncio.sleep(0.01)
        raise RayTaskError(
            "step",
            "Connection closed by peer",
            RuntimeError("Connection closed by peer"),
        )

    async def _ping(self):
        if self.lost_after_s is not None:
            await asyncio.sleep(self.lost_after_s)
            raise ActorDiedError

        await asyncio.sleep(self.busy_s)


@pytest.fixture
def gang(tmp_path):
    return LearnerGang(pytest.fail, load_config(fakes.write_config(tmp_path)))


@pytest.mark.parametrize("seconds", [2, 15, 60])
async def test_a_rank_lost_with_its_node_is_the_gang_s_loss(gang, seconds):
    gang._actors = [Rank(), Rank(lost_after_s=seconds)]
    with pytest.raises(LearnerDownError, match="rank 1 died"):
        await gang._each("step")


async def test_a_mistake_in_the_code_is_loud_at_once(gang):
    gang._actors = [Rank(), Rank()]
    clock = asyncio.get_running_loop()
    started = clock.time()
    with pytest.raises(RayTaskError, match="Connection closed by peer"):
        await gang._each("step")

    assert clock.time() - started < 1.0


async def test_and_after_a_while_when_one_of_them_is_busy(gang):
    gang._actors = [Rank(), Rank(busy_s=3600)]
    with pytest.raises(RayTaskError):
        await asyncio.wait_for(gang._each("step"), 600.0)


@pytest.mark.parametrize(
    "cause", [OSError(28, "No space left on device"), ConfigError("run.directory: another one")]
)
async def test_what_no_rank_died_of_is_told_at_once_also_while_the_others_wait(gang, cause):
    class Refusing(Rank):
        async def _step(self):
            raise RayTaskError("save", "traceback", cause).as_instanceof_cause()

    gang._actors = [Refusing(), Rank(busy_s=3600)]
    clock = asyncio.get_running_loop()
    started = clock.time()
    with pytest.raises(type(cause)):
        await gang._each("step")

    assert clock.time() - started < 1.0


async def test_gradients_add_up_while_weights_are_on_their_way_and_a_step_waits(gang):
    class Working(Rank):
        def __init__(self) -> None:
            super().__init__()
            self.done = []
            self.take = Method(self._take)
            self.accumulate = Method(lambda: self._work("accumulate"))
            self.step = Method(lambda: self._work("step"))

        async def _take(self, share):
            self.done.append("take")
            return []

        async def _work(self, name):
            await asyncio.sleep(0.01)
            self.done.append(name)

    gang._actors = [rank] = [Working()]
    part = pack_batch([Stored(fakes.header(), None)], steps=1, ranks=1, token_budget=99, alpha=1.0)
    async with gang.reserved:
        stepping = asyncio.create_task(gang.step(part))
        await asyncio.gather(gang.accumulate(part), gang.accumulate(part))
        assert rank.done == ["take", "accumulate"] * 2
        assert not stepping.done()

    await stepping
    assert rank.done[4:] == ["take", "step"]


@pytest.mark.parametrize("has_room", [True, False])
async def test_ranks_that_find_no_room_ask_others_to_give_way(tmp_path, monkeypatch, has_room):
    told = []
    room = asyncio.Event()

    @contextmanager
    def give_way(num_ranks):
        told.append(f"{num_ranks} find no room")
        room.set()
        yield
        told.append("they have begun")

    async def meet():
        await room.wait()
        told.append("meet")
        return "1.2.3.4", 5

    async def start(*arguments):
        told.append("start")

    if has_room:
        room.set()
    else:
        monkeypatch.setattr(module, "_ROOM_S", 0.05)

    rank = SimpleNamespace(ping=Method(room.wait), rendezvous=Method(meet), start=Method(start))
    gang = LearnerGang(lambda *_: [rank], load_config(fakes.write_config(tmp_path)))
    gang.give_way = give_way
    await gang.start(0)
    asked = [] if has_room else ["1 find no room", "they have begun"]
    assert told == [*asked, "meet", "start"]


async def test_every_rank_is_told_whose_run_directory_to_look_for(tmp_path):
    asked = []

    class Starting:
        def __init__(self) -> None:
            self.ping = Method(lambda: asyncio.sleep(0))
            self.rendezvous = Method(self._meet)
            self.start = Method(self._start)

        async def _meet(self):
            return "1.2.3.4", 5

        async def _start(self, config, *arguments):
            asked.append(arguments)

    config = load_config(fakes.write_config(tmp_path), ["learner.ranks=2"])
    driver = Holder(host="head", pid=7, since=5.0)
    gang = LearnerGang(lambda *_: [Starting(), Starting()], config, driver)
    await gang.start(3)
    assert asked == [(0, "1.2.3.4", 5, 3, driver), (1, "1.2.3.4", 5, 3, driver)]


def test_a_rank_on_a_machine_with_another_run_directory_does_not_start(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_SEEN_S", 0.0)
    config = load_config(fakes.write_config(tmp_path))
    actor = object.__new__(LearnerActor)
    with pytest.raises(ConfigError, match=r"run\.directory: .* is not the same directory"):
        actor.start(config, 0, "1.2.3.4", 5, 0, Holder(host="head", pid=7, since=5.0))


def test_a_part_that_is_found_one_body_at_a_time_was_not_taken(monkeypatch):
    """Ray may find each body a moment after it did not find all of them."""

    def get(bodies):
        if isinstance(bodies, list) and "body of c" in bodies:
            raise ObjectFetchTimedOutError("00" * 28, "", "")

        return bodies

    def share_of(names):
        stored = [Stored(fakes.header(name), f"body of {name}") for name in names]
        return pack_batch(stored, steps=1, ranks=1, token_budget=99, alpha=1.0).share(0)

    monkeypatch.setattr(learner_actor, "ray", SimpleNamespace(get=get))
    actor = object.__new__(LearnerActor)
    assert actor.take(share_of("ab")) == []
    assert [key.prompt_id for key in actor.take(share_of("cd"))] == ["c", "d"]


async def test_a_run_starts_its_gang_on_the_places_that_were_found_and_with_its_driver(
    tmp_path, monkeypatch
):
    class Enough(Exception):
        pass

    told = []

    @asynccontextmanager
    async def spawner(places):
        told.append(places)
        yield "spawn"

    def make_gang(*arguments):
        told.append(arguments)
        raise Enough

    config = load_config(fakes.write_config(tmp_path), ["cluster.spread=true"])
    driver = Holder(host="head", pid=7, since=5.0)
    monkeypatch.setattr(
        supervisor, "find_places", lambda roles, spread: [*(role.role for role in roles), spread]
    )
    monkeypatch.setattr(supervisor, "_actors", spawner)
    monkeypatch.setattr(supervisor, "LearnerGang", make_gang)
    with pytest.raises(Enough):
        async with supervisor.start_workers(config, 0, None, pytest.fail, driver=driver):
            pytest.fail("it was started")

    assert told == [["learner", "rollout", "teacher teacher", True], ("spawn", config, driver)]


@pytest.mark.parametrize("has_room", [True, False])
async def test_all_fleets_of_a_run_give_way_to_its_learner(tmp_path, monkeypatch, has_room):
    class Enough(Exception):
        pass

    class SomeFleet:
        size = 1
        num_waiting = 0

        def start(self):
            return {}

        @contextmanager
        def give_way(self):
            self.num_waiting += 1
            yield
            self.num_waiting -= 1

    class Gang:
        async def start(self, incarnation):
            with self.give_way(1):
                assert [fleet.num_waiting for fleet in fleets] == [int(not has_room)] * 2

            assert [fleet.num_waiting for fleet in fleets] == [0, 0]
            raise Enough

    def room(role):
        asked.append((role.role, role.actors))
        return has_room

    config = load_config(fakes.write_config(tmp_path), ["learner.ranks=2"])
    fleets, asked = [SomeFleet(), SomeFleet()], []
    monkeypatch.setattr(supervisor, "find_places", lambda roles, spread: {})
    monkeypatch.setattr(supervisor, "LearnerGang", lambda *_: Gang())
    monkeypatch.setattr(supervisor, "engine_fleet", lambda *_, **__: fleets[0])
    monkeypatch.setattr(supervisor, "teacher_fleets", lambda *_: {"teacher": fleets[1]})
    monkeypatch.setattr(supervisor, "has_room", room)
    with pytest.raises(supervisor.StartError, match="learner did not start: Enough"):
        async with supervisor.start_workers(config, 0, None, pytest.fail):
            pytest.fail("it was started")

    assert asked == [("learner", 1)]


def starts(*seconds):
    return {f"engine {number}": asyncio.sleep(s) for number, s in enumerate(seconds)}


async def test_those_that_start_in_turn_have_the_whole_time_each():
    clock = asyncio.get_running_loop()
    await supervisor._all_up(starts(*[0.9] * 5), 1.0, in_turn=True, logs="logs")
    assert clock.time() == pytest.approx(4.5)
    await supervisor._all_up(starts(*[0.9] * 5), 1.0, in_turn=False, logs="logs")
    assert clock.time() == pytest.approx(5.4)


@pytest.mark.parametrize("in_turn", [True, False])
async def test_whoever_is_not_up_in_time_is_named(in_turn):
    with pytest.raises(supervisor.StartError, match=r"start_timeout_s = 1: engine 1; logs in logs"):
        await supervisor._all_up(starts(0.5, 1.1), 1.0, in_turn=in_turn, logs="logs")


async def test_an_actor_that_has_not_started_is_ended_without_being_asked(monkeypatch):
    async def never():
        await asyncio.Event().wait()

    killed = []
    monkeypatch.setattr(actors.ray, "kill", killed.append)
    actor = SimpleNamespace(start=Method(never), close=Method(never))
    process = actors.ActorProcess(actor, None, LearnerDownError)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(process.start(), 0.01)

    await asyncio.wait_for(process.end(), 5.0)
    assert killed == [actor]


def test_a_rank_that_has_not_started_answers():
    """So that what it did not start of is told, and not that it could not be asked."""
    LearnerActor.__new__(LearnerActor).ping()


def test_of_a_dead_actor_the_first_line_is_told():
    died = ActorUnschedulableError("no node is left\n\tactor_id: 7\n\tpid: 1")
    with pytest.raises(LearnerDownError) as caught, actors.dies_as(LearnerDownError):
        raise died

    told = str(caught.value)
    assert told == "its actor died: The actor is not schedulable: no node is left"
    assert caught.value.__cause__ is died
