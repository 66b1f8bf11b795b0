"""The loop on fakes: what is trained, in which order, under which weights, and what happens
when things fail.
"""

import asyncio
import random
from collections import Counter

import fakes
import pytest
from fakes import World

from eopd.ledger import Ledger
from eopd.pipeline import Pipeline, TooManyDroppedError
from eopd.roles import BodiesLostError
from eopd.types import LossReason, LostTrajectory, TrajectoryKey


class FakeWorld(World):
    """Answers after random delays, remembers what it saw."""

    def __init__(self, seed: int = 0, lose: int = 0) -> None:
        super().__init__()
        self.random = random.Random(seed)
        self.trained: list[list[TrajectoryKey]] = []
        self.staleness: list[int] = []
        self.lose = lose
        self.concurrent = self.most_concurrent = 0
        self.seeds: list[int] = []

    async def generate(self, prompt, sample_index, sampling):
        version = self.served
        self.seeds.append(sampling.seed)
        self.concurrent += 1
        self.most_concurrent = max(self.most_concurrent, self.concurrent)
        await asyncio.sleep(self.random.expovariate(1000))
        self.concurrent -= 1
        if self.lose:
            self.lose -= 1
            return fakes.lost(prompt, sample_index)

        return self.write(prompt, sample_index, version, body=sampling.seed)

    async def score(self, stored):
        await asyncio.sleep(self.random.expovariate(2000))
        return stored

    async def step(self, batch):
        self.trained.append(sorted(s.header.key for s in batch.stored()))
        self.staleness += [self.version - s.header.oldest_version for s in batch.stored()]
        await asyncio.sleep(0.001)
        return await super().step(batch)


def pipeline(world: World, *, staleness: int = 0, **options: object) -> Pipeline:
    return fakes.pipeline(world, max_staleness=staleness, token_budget=16, **options)


async def run(line: Pipeline, start: int = 0) -> list[dict[str, float]]:
    return [row async for row in fakes.rows(line, start)]


async def test_synchronous_trains_in_issue_order_with_staleness_zero():
    world = FakeWorld()
    rows = await run(pipeline(world))
    assert set(world.staleness) == {0} and world.most_concurrent == 4
    assert [row["eopd_step"] for row in rows] == list(range(1, 13))
    assert rows[-1]["eopd_response_tokens_total"] == 12 * 4 * 4
    assert all(
        row["eopd_in_flight_trajectories"] == row["eopd_ready_trajectories"] == 0 for row in rows
    )
    issued = [
        TrajectoryKey(s.epoch, s.prompt_id, k) for s, k in map(pipeline(world).order.at, range(48))
    ]
    assert [key for batch in world.trained for key in batch] == [
        key for start in range(0, 48, 4) for key in sorted(issued[start : start + 4])
    ]


@pytest.mark.parametrize(("staleness", "lookahead"), [(1, 0), (2, 1), (3, 1)])
@pytest.mark.parametrize("seed", range(4))
async def test_asynchronous_stays_within_the_bound_and_trains_everything_once(
    staleness, lookahead, seed
):
    world = FakeWorld(seed)
    rows = await run(pipeline(world, staleness=staleness, lookahead=lookahead))
    waiting = [row["eopd_in_flight_trajectories"] + row["eopd_ready_trajectories"] for row in rows]
    # all slots but those of the batch that was just taken
    assert max(waiting) == 4 * (staleness - lookahead)
    assert 0 < max(world.staleness) <= staleness
    counts = Counter(key for batch in world.trained for key in batch)
    assert set(counts.values()) == {1} and len(counts) == 48


async def test_an_epoch_holds_every_prompt_and_sample_once():
    world = FakeWorld()
    await run(pipeline(world, batches=5))  # 20 trajectories: two epochs of 5 prompts x 2 samples
    counts = Counter(key for batch in world.trained for key in batch)
    assert counts == Counter(
        TrajectoryKey(e, f"{i}", k) for e in (0, 1) for i in range(5) for k in (0, 1)
    )


async def test_lost_trajectories_are_issued_again_and_counted():
    world = FakeWorld(lose=3)
    rows = await run(pipeline(world, max_attempts=4))
    # the same sample again might be lost again
    assert len(set(world.seeds)) == len(world.seeds) == 48 + 3
    assert rows[-1]['eopd_lost_trajectories_total{reason="rollout_failed"}'] == 3
    assert sum(len(batch) for batch in world.trained) == 48


class Poisoned(FakeWorld):
    """The teacher cannot score the prompts in ``poison``, whatever was written."""

    def __init__(self, *poison: str) -> None:
        super().__init__()
        self.poison = poison
        self.tried: Counter[TrajectoryKey] = Counter()

    async def score(self, stored):
        key = stored.header.key
        if key.prompt_id in self.poison:
            self.tried[key] += 1
            return LostTrajectory(key=key, reason=LossReason.TEACHER_FAILED, detail="not finite")

        return await super().score(stored)


@pytest.mark.parametrize(("staleness", "lookahead"), [(0, 0), (2, 0), (2, 1)])
async def test_a_poisonous_prompt_is_dropped_and_the_next_ones_take_its_place(staleness, lookahead):
    world, dropped = Poisoned("3"), []
    line = pipeline(
        world,
        staleness=staleness,
        lookahead=lookahead,
        max_dropped=99,
        on_drop=lambda issue, lost: dropped.append((issue, lost.key, lost.reason)),
    )
    rows = await run(line)
    assert [len(batch) for batch in world.trained] == [4] * 12 and max(world.staleness) <= staleness
    assert set(world.tried.values()) == {3}
    keys = [
        TrajectoryKey(s.epoch, s.prompt_id, k)
        for s, k in map(line.order.at, range(line.ledger.settled.floor))
    ]
    poisonous = [(issue, key) for issue, key in enumerate(keys) if key.prompt_id == "3"]
    assert sorted(dropped) == [(issue, key, LossReason.TEACHER_FAILED) for issue, key in poisonous]
    assert (
        line.ledger.dropped == {issue for issue, _ in poisonous} and len(line.ledger.dropped) >= 10
    )
    assert sorted(key for batch in world.trained for key in batch) == sorted(
        k for k in keys if k.prompt_id != "3"
    )
    assert rows[-1]["eopd_dropped_trajectories_total"] == len(poisonous)


async def test_a_batch_that_waited_for_a_dropped_trajectory_does_not_wait_for_the_one_in_its_place():
    order = fakes.order(prompts=20, samples=1)
    poison, in_its_place = (order.at(issue)[0].prompt_id for issue in (1, 8))

    class World(Poisoned):
        async def generate(self, prompt, sample_index, sampling):
            if prompt.prompt_id == in_its_place:
                await asyncio.sleep(3600)
            return await super().generate(prompt, sample_index, sampling)

    world = World(poison)
    steps = pipeline(world, staleness=1, of=order, max_dropped=1, batches=2).steps(0)
    done = await asyncio.wait_for(anext(steps), 5.0)
    assert sorted(done.trained) == [0, 2, 3, 4]
    await steps.aclose()


async def test_more_dropped_than_a_run_may_lose_end_it_with_the_last_reason():
    world = Poisoned("3")
    with pytest.raises(
        TooManyDroppedError,
        match=r"3 trajectories were dropped after flow.max_attempts = 3 attempts",
    ):
        await run(pipeline(world, max_dropped=2))

    assert asyncio.all_tasks() == {asyncio.current_task()}
    with pytest.raises(TooManyDroppedError, match=r"prompt_id='3'.*: teacher_failed: not finite"):
        await run(pipeline(Poisoned("3"), max_dropped=0))


async def test_a_resumed_run_does_not_try_again_what_was_dropped():
    first, second = Poisoned("3"), Poisoned("3")
    line = pipeline(first, max_dropped=99)
    steps = line.steps(0)
    for _ in range(6):
        await anext(steps)

    await steps.aclose()
    dropped = set(line.ledger.dropped)
    ledger = Ledger.restore(**line.ledger.state())
    second.version = second.served = 6
    await run(pipeline(second, ledger=ledger, max_dropped=99), start=6)
    assert dropped and not set(first.tried) & set(second.tried)
    counts = Counter(key for world in (first, second) for batch in world.trained for key in batch)
    assert len(counts) == 48 and set(counts.values()) == {1}


async def test_bodies_that_are_lost_before_the_update_are_sampled_again_and_the_batch_is_trained():
    class Forgetful(FakeWorld):
        gone = 3

        async def step(self, batch):
            if self.gone:
                self.gone -= 1
                raise BodiesLostError([stored.header.key for stored in batch.stored()][:2])

            return await super().step(batch)

    world = Forgetful()
    rows = await run(pipeline(world, max_attempts=1))
    assert rows[-1]['eopd_lost_trajectories_total{reason="body_lost"}'] == 6
    assert rows[-1]["eopd_dropped_trajectories_total"] == 0
    counts = Counter(key for batch in world.trained for key in batch)
    assert len(counts) == 48 and set(counts.values()) == {1}


async def test_a_learner_that_raises_ends_the_run_and_leaves_no_task_behind():
    class Broken(FakeWorld):
        async def step(self, batch):
            raise ArithmeticError("not finite")

    with pytest.raises(ArithmeticError, match="not finite"):
        await run(pipeline(Broken(), staleness=2))

    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_stopping_and_resuming_trains_what_an_undisturbed_run_trains():
    undisturbed, first, second = FakeWorld(), FakeWorld(), FakeWorld(seed=9)
    await run(pipeline(undisturbed, staleness=2, lookahead=1))
    line = pipeline(first, staleness=2, lookahead=1)
    steps = line.steps(0)
    for _ in range(5):
        await anext(steps)

    await steps.aclose()
    ledger = Ledger.restore(**line.ledger.state())
    second.version = second.served = 5
    await run(pipeline(second, staleness=2, lookahead=1, ledger=ledger), start=5)
    resumed = Counter(key for world in (first, second) for batch in world.trained for key in batch)
    assert resumed == Counter(key for batch in undisturbed.trained for key in batch)


@pytest.mark.parametrize("batch", [2, 3, 7])
@pytest.mark.parametrize(
    "modes", [((0, 0), (0, 0)), ((2, 1), (2, 1)), ((3, 2), (0, 0)), ((0, 0), (3, 1))]
)
async def test_a_run_may_go_on_with_another_size_of_batch_and_another_staleness(batch, modes):
    first, second = FakeWorld(), FakeWorld(seed=9)
    (staleness, lookahead), (staleness_after, lookahead_after) = modes
    line = pipeline(first, staleness=staleness, lookahead=lookahead)
    steps = line.steps(0)
    for _ in range(5):
        await anext(steps)

    await steps.aclose()
    second.version = second.served = 5
    ledger = Ledger.restore(**line.ledger.state())
    mode = {"staleness": staleness_after, "lookahead": lookahead_after}
    async with asyncio.timeout(10):
        rows = await run(pipeline(second, batch=batch, ledger=ledger, **mode), start=5)

    assert [row["eopd_step"] for row in rows] == [float(step) for step in range(6, 13)]
    assert [len(taken) for taken in second.trained] == [batch] * 7
    assert max(second.staleness) <= staleness_after
    total = 5 * 4 + 7 * batch
    issued = [TrajectoryKey(s.epoch, s.prompt_id, k) for s, k in map(line.order.at, range(total))]
    assert sorted(
        key for world in (first, second) for taken in world.trained for key in taken
    ) == sorted(issued)
