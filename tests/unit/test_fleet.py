"""Workers that are started, lost, replaced, more or fewer: on processes that are told what to do."""

import asyncio
from types import SimpleNamespace

import fakes
import pytest

from eopd import fleet as module
from eopd.fleet import Fleet, GaveWayError, NobodyLeftError, one_by_one
from eopd.pool import Pool
from eopd.roles import EngineDownError, TeacherDownError
from eopd.runtime.engines import EnginePool
from eopd.runtime.restarts import RestartBudget, TooManyRestartsError
from eopd.runtime.teachers import TeacherRouter
from eopd.telemetry.series import series
from eopd.types import LostReason, LostTrajectory, Sampling, Stored

pytestmark = [pytest.mark.timeout(60), pytest.mark.virtual_time]


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    monkeypatch.setattr(module, "PAUSES_S", (0.0, 0.01))


class Process:
    """Starts after ``start_s`` or raises ``error``; notes its end."""

    def __init__(self, number: int) -> None:
        self.worker = f"worker {number}"
        self.number = number
        self.start_s = 0.0
        self.error = None
        self.ended = False

    async def start(self) -> int:
        await asyncio.sleep(self.start_s)
        if self.error:
            raise self.error

        return 4

    async def end(self) -> None:
        self.ended = True


class World:
    """A fleet, its processes in the order they were made, and what was said and spent."""

    def __init__(self, size: int, *, max_restarts: int = 100, start_timeout_s: float = 0.2) -> None:
        self.processes: list[Process] = []
        self.said: list[str] = []
        self.spoil = lambda process: None  # what becomes of new processes
        self.budget = RestartBudget(max_restarts, 3600.0, lambda: self.fleet.size)
        self.pool = Pool("engine", timeout_s=5.0, ping=lambda worker: asyncio.sleep(0))
        self.fleet = Fleet(
            self.pool,
            spawn=self.spawn,
            size=size,
            count_loss=self.budget.count_loss,
            start_timeout_s=start_timeout_s,
            log=self.said.append,
        )

    def slow(self, start_s: float) -> None:
        """New processes take so long to start from now on."""

        def spoil(process: Process) -> None:
            process.start_s = start_s

        self.spoil = spoil

    def spawn(self, numbers) -> list[Process]:
        new = [Process(number) for number in numbers]
        for process in new:
            self.spoil(process)

        self.processes += new
        return new

    async def start(self) -> Fleet:
        await asyncio.gather(*self.fleet.start().values())
        return self.fleet

    def alive(self) -> list[int]:
        return sorted(process.number for process in self.processes if not process.ended)


async def name(worker: str) -> str:
    return worker


async def test_a_lost_worker_is_ended_and_another_one_has_its_number():
    world = World(2)
    fleet = await world.start()
    left, joined = [], []

    async def leave(number):
        left.append(number)

    async def join(number, worker):
        joined.append((number, worker))

    fleet.after_loss, fleet.join = leave, join
    world.pool.lose(1, "its actor died")
    assert world.pool.num_up == 1 and fleet.size == 2
    await fakes.until(lambda: world.pool.num_up == 2)
    assert (left, joined, world.alive(), world.processes[1].ended) == (
        [1],
        [(1, "worker 1")],
        [0, 1],
        True,
    )
    assert fleet.num_replacements == 1
    assert world.said == [
        "engine 1: its actor died; going on with 1 of 2 while another one is started",
        "engine 1 is up again: 2 of 2",
    ]


async def with_a_slow_start() -> World:
    """A fleet whose only worker was lost, and another one does not come up."""
    world = World(1)
    await world.start()
    world.slow(3600.0)
    world.pool.lose(0, "its actor died")
    await fakes.until(lambda: len(world.processes) == 2)
    return world


async def test_only_who_is_still_starting_gives_way_and_starts_again():
    world = World(2, start_timeout_s=60.0)
    fleet = await world.start()
    world.pool.lose(0, "its actor died")
    await fakes.until(lambda: world.pool.num_up == 2)
    world.slow(3600.0)
    world.pool.lose(1, "its actor died")
    await fakes.until(lambda: len(world.processes) == 4)
    _, starting = world.processes[2:]

    with fleet.give_way():
        await fakes.until(lambda: starting.ended)
        assert world.said[-1] == (
            "engine 1 did not start: it gives way to others, who find no room; trying again"
        )
        world.pool.lose(0, "its actor died")  # whose replacement waits too
        await asyncio.sleep(0.05)
        assert len(world.processes) == 4 and not world.alive()

    world.slow(0.0)
    await fakes.until(lambda: world.pool.num_up == 2)
    assert world.alive() == [0, 1]


async def test_a_join_under_way_gives_way_and_so_does_a_newcomer():
    world = World(1, start_timeout_s=60.0)
    fleet = await world.start()
    ended = []

    async def join(number, worker):
        try:
            await asyncio.sleep(3600.0)
        finally:
            ended.append(number)

    fleet.join = join
    growing = asyncio.create_task(fleet.scale(2))
    world.pool.lose(0, "its actor died")
    await fakes.until(lambda: len(world.processes) == 3)
    await asyncio.sleep(0.01)
    with fleet.give_way():
        with pytest.raises(GaveWayError, match="gives way to others"):
            await growing

        assert sorted(ended) == [0, 1]
        assert fleet.size == 1 and not world.alive()

    await fleet.close()


async def test_who_gives_way_is_given_all_the_time_to_start_that_there_is():
    """An only worker: the fleet does not fail while it may not start."""
    world = await with_a_slow_start()
    fleet = world.fleet
    with fleet.give_way():
        await asyncio.sleep(3 * 0.2)  # three times the time-out
        world.slow(0.0)
        waiting = asyncio.create_task(world.pool.run(name))
        await asyncio.sleep(0)

    assert await waiting == "worker 0"


async def test_who_has_given_way_and_finds_no_room_after_all_ends_the_run():
    world = await with_a_slow_start()
    fleet = world.fleet
    with fleet.give_way():
        await asyncio.sleep(0.01)

    with pytest.raises(NobodyLeftError):
        await asyncio.wait_for(world.pool.run(name), 5.0)

    await fleet.close()


async def test_a_fleet_whose_first_workers_are_still_starting_gives_way_to_nobody():
    world = World(1, start_timeout_s=0.05)
    world.processes[0].start_s = 0.1
    starting = asyncio.gather(*world.fleet.start().values())
    with world.fleet.give_way():
        await asyncio.sleep(0.01)

    await starting
    await asyncio.sleep(0.1)  # and no clock runs on that ends the run
    assert await world.pool.run(name) == "worker 0"
    assert world.alive() == [0]


async def test_a_fleet_that_gives_way_can_be_closed():
    world = World(2)
    fleet = await world.start()
    world.slow(3600.0)
    world.pool.lose(0, "its actor died")
    await fakes.until(lambda: len(world.processes) == 3)
    with fleet.give_way():
        await fleet.close()

    assert len(world.processes) == 3


async def test_a_lost_node_costs_a_loss_for_each_worker():
    """8 of 64, and no room for others until it is back."""
    world = World(64, start_timeout_s=0.02)
    fleet = await world.start()

    world.slow(3600.0)
    for number in range(8):
        world.pool.lose(number, "its node is gone")

    await fakes.until(lambda: len(world.processes) > 64 + 3 * 8)  # it is tried again and again
    assert world.pool.num_up == 56 and fleet.size == 64 and fleet.num_replacements == 0
    assert len(world.budget._causes) == 8, "attempts to start cost nothing"
    assert await world.pool.run(name) != "worker 0"
    assert sum("did not start" in text for text in world.said) == 8, "and are told once"
    world.spoil = lambda process: None
    await fakes.until(lambda: world.pool.num_up == 64)
    assert len(world.alive()) == 64
    await fleet.close()


async def test_with_nobody_left_all_who_wait_are_told_the_causes():
    world = World(2, start_timeout_s=0.3)
    fleet = await world.start()

    def broken(process):
        process.error = OSError("no memory")

    world.spoil = broken
    for number in range(2):
        world.pool.lose(number, "its node is gone")

    with pytest.raises(NobodyLeftError) as raised:
        await asyncio.wait_for(world.pool.run(name), 2.0)

    assert str(raised.value).splitlines() == [
        "no engine is left, and none came up within cluster.start_timeout_s = 0.3:",
        "  engine 0: its node is gone",
        "  engine 1: its node is gone",
        "  engine 0 did not start: no memory",
        "  engine 1 did not start: no memory",
    ]
    await fleet.close()


async def test_nobody_is_waited_for_longer_than_one_start():
    """The cluster has no room: the first start has not ended when it is known that none comes."""
    world = World(1, start_timeout_s=0.5)
    fleet = await world.start()
    world.slow(3600.0)
    world.pool.lose(0, "its node is gone")
    clock = asyncio.get_running_loop()
    started = clock.time()
    with pytest.raises(NobodyLeftError):
        await world.pool.run(name)
    assert clock.time() - started < 0.9
    await fleet.close()


async def test_one_that_has_started_and_waits_for_the_learner_is_coming():
    """A join may wait for a whole step of the learner, which is nobody's start time."""
    world = World(1, start_timeout_s=0.3)
    fleet, gate = await world.start(), asyncio.Event()

    async def join(number, worker):
        await gate.wait()

    fleet.join = join
    world.pool.lose(0, "died")
    waiting = asyncio.create_task(world.pool.run(name))
    await asyncio.sleep(0.8)
    assert not waiting.done() and len(world.processes) == 2 and len(world.budget._causes) == 1
    gate.set()
    assert await waiting == "worker 0"


async def test_with_nobody_left_newcomers_that_cannot_join_end_the_run():
    world = World(1, start_timeout_s=1.0)
    fleet = await world.start()

    async def join(number, worker):
        raise EngineDownError("no route to host")

    fleet.join = join
    world.spoil = lambda process: setattr(process, "start_s", 0.05)
    world.pool.lose(0, "died")
    with pytest.raises(NobodyLeftError, match="engine 0 did not start: no route to host"):
        await asyncio.wait_for(world.pool.run(name), 5.0)

    await fleet.close()


async def test_a_fleet_is_closed_once_the_joins_under_way_have_ended():
    """Until then the learner and the other engines are in the middle of a transfer with it."""
    world, happened, joining = World(1), [], asyncio.Event()
    fleet = await world.start()

    async def join(number, worker):
        joining.set()
        try:
            await asyncio.sleep(3600.0)
        finally:
            await asyncio.sleep(0.01)
            happened.append("the join has ended")

    fleet.join = join
    world.pool.lose(0, "died")
    await joining.wait()
    await fleet.close()
    happened.append("closed")
    assert happened == ["the join has ended", "closed"]


async def test_one_loss_too_many_is_told_to_all_who_wait():
    world = World(2, max_restarts=1)
    fleet = await world.start()
    world.pool.lose(0, "died")
    await fakes.until(lambda: world.pool.num_up == 2)
    waiting = [
        asyncio.create_task(world.pool.run(lambda worker: asyncio.sleep(3600))) for _ in range(12)
    ]
    await asyncio.sleep(0.01)
    world.pool.lose(1, "died too")
    for request in waiting[8:]:
        with pytest.raises(TooManyRestartsError, match="engine 1: died too"):
            await request

    for request in waiting[:8]:
        request.cancel()

    await fleet.close()


async def test_those_there_stay_and_the_last_ones_go_first():
    world = World(2)
    fleet, parted = await world.start(), []

    async def part(number):
        parted.append(number)

    fleet.after_drain = part
    await fleet.scale(4)
    assert world.alive() == [0, 1, 2, 3]
    assert fleet.size == world.pool.num_up == 4
    await fleet.scale(1)
    assert world.alive() == [0]
    assert parted == [3, 2, 1]
    assert fleet.size == world.pool.num_up == 1
    await fleet.scale(2)
    assert world.alive() == [0, 1] and len(world.processes) == 5


async def test_newcomers_of_one_wish_start_together():
    world = World(1, start_timeout_s=5.0)
    fleet = await world.start()

    world.slow(0.3)
    await asyncio.wait_for(fleet.scale(9), 1.5)
    assert world.pool.num_up == 9


async def test_one_that_does_not_start_is_ended_and_the_others_stay():
    world = World(2)
    fleet = await world.start()

    def spoil(process):
        if process.number == 3:
            process.error = EngineDownError("killed by the node's memory monitor")

        if process.number == 4:
            process.start_s = 3600.0

    world.spoil = spoil
    with pytest.raises(EngineDownError):
        await fleet.scale(5)

    assert world.alive() == [0, 1, 2]
    assert fleet.size == world.pool.num_up == 3


async def test_one_that_is_being_replaced_goes_first():
    world = World(3)
    fleet = await world.start()

    world.slow(0.1)
    world.pool.lose(1, "its node is gone")
    await asyncio.sleep(0.01)
    await fleet.scale(2)
    await asyncio.sleep(0.2)
    assert world.alive() == [0, 2]
    assert fleet.size == world.pool.num_up == 2


async def test_one_that_is_lost_while_it_leaves_is_not_replaced():
    world = World(2)
    fleet = await world.start()
    held = asyncio.create_task(world.pool.run(lambda worker: asyncio.sleep(3600)))
    other = asyncio.create_task(world.pool.run(lambda worker: asyncio.sleep(3600)))
    await asyncio.sleep(0.01)
    leaving = asyncio.create_task(fleet.scale(1))
    await asyncio.sleep(0.01)
    assert not leaving.done() and fleet.size == 1, "who leaves is not wanted"
    row = EnginePool(fleet).metrics()
    in_flight = [row[f'eopd_engine_in_flight_trajectories{{engine="{n}"}}'] for n in (0, 1)]
    assert (row["eopd_engines_wanted"], in_flight) == (1.0, [1.0, 1.0]), "and ends its answers"
    world.pool.lose(1, "its node is gone")
    await asyncio.wait_for(leaving, 2.0)
    await asyncio.sleep(0.05)
    assert world.alive() == [0] and len(world.processes) == 2 and fleet.size == 1
    assert world.pool.in_flight == {0: 2}, "what it had goes to the other one"
    held.cancel()
    other.cancel()


async def test_closing_stops_what_is_being_replaced():
    world = World(1)
    fleet = await world.start()

    world.slow(3600.0)
    world.pool.lose(0, "died")
    await asyncio.sleep(0.01)
    await asyncio.wait_for(fleet.close(), 1.0)
    assert all(task.done() for task in fleet._replacing.values()) and fleet.num_replacements == 0


PROMPT = fakes.prompt(epoch=1)
SAMPLING = Sampling(temperature=1.0, max_tokens=4, seed=11)


async def one_of(worker, *, timeout_s: float = 0.05) -> Fleet:
    """A fleet of one that is up."""
    world = World(1)
    world.fleet.pool = world.pool = Pool(
        "it",
        timeout_s=timeout_s,
        ping=lambda worker: asyncio.sleep(0),
    )
    world.pool.add(0, worker, 8)
    return world.fleet


class Engine:
    async def generate(self, prompt, sample_index, sampling):
        if sampling.seed == 13:
            await asyncio.sleep(3600)

        return sampling.seed


async def test_a_response_that_does_not_end_in_time_is_lost():
    pool = EnginePool(await one_of(Engine()))
    assert await pool.generate(PROMPT, 0, SAMPLING) == 11
    found = await pool.generate(
        PROMPT,
        3,
        Sampling(temperature=1.0, max_tokens=4, seed=13),
    )
    assert isinstance(found, LostTrajectory)
    assert found.key == (1, "p", 3)
    assert found.reason == LostReason.ROLLOUT_FAILED
    assert found.detail == "no answer of it 0 within 0.05 s"
    assert pool.metrics() == {
        "eopd_engine_failures_total": 1.0,
        "eopd_engine_replacements_total": 0.0,
        "eopd_engines_up": 1.0,
        "eopd_engines_wanted": 1.0,
        'eopd_engine_in_flight_trajectories{engine="0"}': 0.0,
    }


class Teacher:
    def __init__(self, name: str) -> None:
        self.name = name

    async def score(self, stored):
        match stored.header.key.prompt_id:
            case "bad":
                return fakes.lost(
                    PROMPT,
                    reason=LostReason.TEACHER_FAILED,
                    detail="not finite",
                )
            case "slow":
                await asyncio.sleep(3600)
            case "killed":
                raise TeacherDownError("its engine died")

        return Stored(stored.header, self.name)


def stored(prompt_id: str = "p", source: str = "s") -> Stored:
    return Stored(fakes.header(prompt_id, source=source, num_response=5), None)


async def test_what_a_teacher_cannot_score_or_not_in_time_is_lost_at_once():
    fleets = {"t": await one_of(Teacher("a"))}
    pool = TeacherRouter(fleets, lambda source: SimpleNamespace(name="t"))
    assert (await pool.score(stored())).body == "a"
    assert (await pool.score(stored("bad"))).detail == "not finite"
    slow = await pool.score(stored("slow"))
    assert slow.reason == LostReason.TEACHER_FAILED
    assert slow.detail == "no answer of it 0 within 0.05 s"
    metrics = {
        name: pool.metrics()[series(f"eopd_teacher_{name}", teacher="t")]
        for name in ("tokens_total", "failures_total", "replicas_up", "replicas_wanted")
    }
    assert list(metrics.values()) == [5.0, 1.0, 1.0, 1.0]


async def test_sources_have_their_teachers_and_the_rest_the_default():
    fleets = {name: await one_of(Teacher(name)) for name in ("m", "r")}
    names = {"math": "m", "aime": "m", "code": "r"}
    router = TeacherRouter(
        fleets,
        lambda source: SimpleNamespace(name=names[source]) if source in names else None,
    )
    found = [
        (await router.score(stored(source=source))).body for source in ("math", "aime", "code")
    ]
    assert found == ["m", "m", "r"]
    totals = [series("eopd_teacher_tokens_total", teacher=name) for name in ("m", "r")]
    assert [router.metrics()[name] for name in totals] == [10.0, 5.0]
    with pytest.raises(KeyError, match="law"):
        await router.score(stored(source="law"))


async def test_starts_one_by_one_never_overlap_and_keep_their_order():
    events = []

    async def start(name):
        events.append(f"{name} begins")
        await asyncio.sleep(0)
        events.append(f"{name} is up")

    starting = one_by_one({name: start(name) for name in "abc"})
    await asyncio.gather(*starting.values())
    assert list(starting) == ["a", "b", "c"]
    assert events == [f"{name} {what}" for name in "abc" for what in ("begins", "is up")]


async def test_a_start_that_fails_lets_the_next_one_begin():
    async def fail():
        raise RuntimeError("no memory")

    began = asyncio.Event()

    async def begin():
        began.set()

    outcomes = await asyncio.gather(
        *one_by_one({"a": fail(), "b": begin()}).values(), return_exceptions=True
    )
    assert began.is_set()
    assert str(outcomes[0]) == "no memory"
