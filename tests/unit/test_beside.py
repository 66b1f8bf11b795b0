"""Benchmarks beside training, on fakes: who waits for whom, and what becomes of a failure."""

import asyncio

import fakes
import pytest

from eopd.evaluation.beside import Beside, OneVersion
from eopd.pipeline import Pipeline
from eopd.types import (
    LostTrajectory,
    PolicyVersion,
    RunFailedError,
    Sampling,
    Stored,
    first_failure,
)

SAMPLING = Sampling(temperature=1.0, max_tokens=4, seed=1, priority=-1)


class Engines:
    """Answers once ``free`` is set, with the version that is served then."""

    def __init__(self, world: fakes.World) -> None:
        self.world = world
        self.free = asyncio.Event()
        self.error: Exception | None = None

    async def generate(self, prompt, sample_index, sampling):
        await self.free.wait()
        if self.error is not None:
            raise self.error

        return self.world.write(prompt, sample_index, self.world.served)


class Watched(fakes.World):
    """Notes what it does, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[str] = []

    async def step(self, batch):
        stats = await super().step(batch)
        self.done.append(f"step {self.version}")
        return stats

    async def publish(self, version, on_sent):
        self.done.append(f"publish {version.step}")
        return await super().publish(version, on_sent)


async def ask(engines: OneVersion, answers: list[object]) -> None:
    """A benchmark of two prompts."""
    with first_failure():
        async with asyncio.TaskGroup() as group:
            asked = [
                group.create_task(engines.generate(fakes.prompt(name), 0, SAMPLING))
                for name in "ab"
            ]

    answers += [one.result() for one in asked]


def line(world: fakes.World, beside: Beside, **plan: object) -> Pipeline:
    """A loop whose publish waits for what is beside it."""
    made = fakes.pipeline(world, **plan)
    made.before_publish = beside.written
    return made


async def publish(world: fakes.World, beside: Beside) -> None:
    """What the loop does with new weights."""
    await beside.written()
    await world.publish(PolicyVersion(0, 1), lambda: None)


async def settle() -> None:
    """Lets everything go on that can."""
    for _ in range(50):
        await asyncio.sleep(0)


@pytest.mark.parametrize("staleness", [0, 2])
async def test_the_next_publish_waits_and_the_next_step_does_not(staleness):
    world, beside, answers = Watched(), Beside(), []
    engines = Engines(world)
    loop = line(world, beside, batches=2, max_staleness=staleness)

    async with asyncio.timeout(5):
        steps = loop.steps(0)
        await anext(steps)
        asked = OneVersion(engines, 1, 2)
        beside.start(asked, ask(asked, answers))
        following = asyncio.create_task(anext(steps))
        await settle()
        assert world.done == ["step 1", "publish 1", "step 2"]
        assert not following.done()
        assert beside.left == 2

        engines.free.set()
        await following
        await beside.finish()
        await steps.aclose()

    assert world.done[-1] == "publish 2"
    assert [one.header.oldest_version for one in answers] == [1, 1]
    assert beside.left == 0


async def test_grades_hold_up_no_publish():
    world, beside, graded = Watched(), Beside(), asyncio.Event()
    engines = Engines(world)
    engines.free.set()
    asked = OneVersion(engines, 0, 2)

    async def work() -> None:
        await ask(asked, [])
        await graded.wait()

    beside.start(asked, work())
    async with asyncio.timeout(5):
        await publish(world, beside)
        graded.set()
        await beside.finish()

    assert world.done == ["publish 1"]


async def test_what_other_weights_wrote_is_lost():
    """An engine that was replaced serves the weights that the learner holds by then."""
    world = fakes.World()
    engines = Engines(world)
    engines.free.set()
    asked = OneVersion(engines, 3, 2)
    world.served = 3
    assert isinstance(await asked.generate(fakes.prompt(), 0, SAMPLING), Stored)
    world.served = 4
    lost = await asked.generate(fakes.prompt(), 1, SAMPLING)
    assert isinstance(lost, LostTrajectory)
    assert lost.detail == "written by weights of step 4, not 3"
    assert asked.written.is_set(), "it was answered all the same"


async def test_what_is_given_up_holds_nothing_up():
    world, beside = Watched(), Beside()
    asked = OneVersion(Engines(world), 0, 2)
    beside.start(asked, ask(asked, []))
    publishing = asyncio.create_task(publish(world, beside))
    await settle()
    assert world.done == []

    async with asyncio.timeout(5):
        assert await beside.cancel()
        await publishing
        assert not await beside.cancel()

    assert world.done == ["publish 1"]


@pytest.mark.parametrize(
    ("error", "raised"),
    [(RunFailedError("no engine is left"), RunFailedError), (KeyError("a bug"), ExceptionGroup)],
)
async def test_a_benchmark_that_fails_lets_a_publish_go_on_and_ends_the_run_then(error, raised):
    world, beside = Watched(), Beside()
    engines = Engines(world)
    engines.error = error
    engines.free.set()
    asked = OneVersion(engines, 0, 2)
    beside.start(asked, ask(asked, []))

    async with asyncio.timeout(5):
        await publish(world, beside)

    assert world.done == ["publish 1"]
    with pytest.raises(raised) as caught:
        beside.raise_failed()

    assert raised is ExceptionGroup or caught.value is error
    beside.raise_failed()  # once is enough
