"""The loop on fakes: what is trained, in which order, under which weights, and what happens
when things fail.
"""

import asyncio
import itertools
import json
import random
from collections import Counter

import fakes
import pytest
from fakes import World

from eopd.ledger import Ledger
from eopd.pipeline import NothingKeptError, Pipeline, TooManyDroppedError
from eopd.roles import BodiesLostError, LearnerDownError
from eopd.types import LostReason, LostTrajectory, TrajectoryKey


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
        whole = self.whole(batch)
        self.trained.append(sorted(stored.header.key for stored in whole))
        self.staleness += [self.version - stored.header.oldest_version for stored in whole]
        await asyncio.sleep(0.001)
        return await super().step(batch)


def pipeline(world: World, *, staleness: int = 0, **options: object) -> Pipeline:
    """Parts of a batch are of two trajectories of six tokens, one for each rank."""
    return fakes.pipeline(
        world,
        max_staleness=staleness,
        **{"token_budget": 6, **options},
    )


async def run(line: Pipeline, start: int = 0) -> list[dict[str, float]]:
    return [row async for row in fakes.rows(line, start)]


def keys(line: Pipeline, count: int) -> list[TrajectoryKey]:
    """The first trajectories that a loop issues."""
    samples = map(line.order.at, range(count))
    return [
        TrajectoryKey(
            prompt.epoch,
            prompt.prompt_id,
            index,
        )
        for prompt, index in samples
    ]


def times_trained(*worlds: FakeWorld) -> Counter[TrajectoryKey]:
    batches = itertools.chain.from_iterable(world.trained for world in worlds)
    return Counter(itertools.chain.from_iterable(batches))


async def test_whoever_looks_on_sees_each_step_with_the_batch_it_trained_on():
    world = FakeWorld()
    line = pipeline(world)
    seen = []
    line.on_trained = lambda step, batch: seen.append((step, batch))
    await run(line)
    assert [step for step, _ in seen] == list(range(1, 13))
    trained = [sorted(one.header.key for one in batch) for _, batch in seen]
    assert trained == world.trained


async def test_synchronous_trains_in_issue_order_with_staleness_zero():
    world = FakeWorld()
    rows = await run(pipeline(world))
    assert set(world.staleness) == {0}
    assert world.most_concurrent == 4
    assert [row["eopd_step"] for row in rows] == list(range(1, 13))
    assert rows[-1]["eopd_response_tokens_total"] == 12 * 4 * 4
    assert {row["eopd_in_flight_trajectories"] for row in rows} == {0}
    assert {row["eopd_ready_trajectories"] for row in rows} == {0}
    issued = keys(pipeline(world), 48)
    assert len(world.trained) == 12
    for number, batch in enumerate(world.trained):
        assert batch == sorted(issued[4 * number : 4 * number + 4])


@pytest.mark.parametrize(
    ("staleness", "lookahead"),
    [
        (1, 0),
        (2, 1),
        (3, 1),
    ],
)
@pytest.mark.parametrize("seed", range(4))
async def test_asynchronous_trains_everything_once_within_the_bound(staleness, lookahead, seed):
    world = FakeWorld(seed)
    rows = await run(pipeline(world, staleness=staleness, lookahead=lookahead))
    waiting = [row["eopd_in_flight_trajectories"] + row["eopd_ready_trajectories"] for row in rows]
    # all slots but those of the batch that was just taken
    assert max(waiting) == 4 * (staleness - lookahead)
    assert 0 < max(world.staleness) <= staleness
    counts = times_trained(world)
    assert set(counts.values()) == {1}
    assert len(counts) == 48


async def test_an_epoch_holds_every_prompt_and_sample_once():
    world = FakeWorld()
    await run(pipeline(world, batches=5))  # 20 trajectories: two epochs of 5 prompts x 2 samples
    samples = itertools.product((0, 1), "01234", (0, 1))
    assert times_trained(world) == Counter(TrajectoryKey(*sample) for sample in samples)


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
            return LostTrajectory(
                key=key,
                reason=LostReason.TEACHER_FAILED,
                detail="not finite",
            )

        return await super().score(stored)


@pytest.mark.parametrize(
    ("staleness", "lookahead"),
    [
        (0, 0),
        (2, 0),
        (2, 1),
    ],
)
async def test_a_poisonous_prompt_is_dropped(staleness, lookahead):
    world, dropped = Poisoned("3"), []
    line = pipeline(
        world,
        staleness=staleness,
        lookahead=lookahead,
        max_dropped=99,
        on_drop=lambda issue, lost: dropped.append((issue, lost.key, lost.reason)),
    )
    rows = await run(line)
    assert [len(batch) for batch in world.trained] == [4] * 12
    assert max(world.staleness) <= staleness
    assert set(world.tried.values()) == {3}
    issued = dict(enumerate(keys(line, line.ledger.settled.floor)))
    poisonous = {issue: key for issue, key in issued.items() if key.prompt_id == "3"}
    assert {reason for *_, reason in dropped} == {LostReason.TEACHER_FAILED}
    assert sorted((issue, key) for issue, key, _ in dropped) == sorted(poisonous.items())
    assert line.ledger.dropped == poisonous.keys()
    assert len(line.ledger.dropped) >= 10
    others = [key for key in issued.values() if key.prompt_id != "3"]
    assert times_trained(world) == Counter(others)
    assert rows[-1]["eopd_dropped_trajectories_total"] == len(poisonous)


class Picky(FakeWorld):
    """The filter drops every trajectory of the prompts in ``unwanted``."""

    def __init__(self, *unwanted: str) -> None:
        super().__init__()
        self.unwanted = unwanted
        self.asked: Counter[TrajectoryKey] = Counter()

    async def score(self, stored):
        key = stored.header.key
        self.asked[key] += 1
        if key.prompt_id in self.unwanted:
            return LostTrajectory(
                key=key,
                reason=LostReason.FILTERED,
                detail="my:keep said no",
            )

        return await super().score(stored)


@pytest.mark.parametrize(
    ("staleness", "lookahead"),
    [
        (0, 0),
        (2, 0),
        (2, 1),
    ],
)
async def test_what_the_filter_drops_is_counted_and_costs_no_attempt(staleness, lookahead):
    world, told = Picky("1", "3", "4"), []
    line = pipeline(
        world,
        staleness=staleness,
        lookahead=lookahead,
        max_dropped=0,
        on_drop=lambda issue, lost: told.append((issue, lost.key.prompt_id, lost.reason)),
    )
    rows = await run(line)

    assert [len(batch) for batch in world.trained] == [4] * 12
    assert max(world.staleness) <= staleness
    assert set(world.asked.values()) == {1}, "nothing is sampled again"
    issued = dict(enumerate(keys(line, line.ledger.settled.floor)))
    filtered = {issue for issue, key in issued.items() if key.prompt_id in world.unwanted}
    assert filtered <= {issue for issue, *_ in told} and len(filtered) > 48
    assert {prompt for _, prompt, _ in told} == {"1", "3", "4"}
    assert {reason for *_, reason in told} == {LostReason.FILTERED}
    assert not line.ledger.dropped
    assert rows[-1]["eopd_filtered_trajectories_total"] == line.ledger.num_filtered == len(told)
    assert rows[-1]["eopd_dropped_trajectories_total"] == 0
    assert not any(rows[-1][name] for name in rows[-1] if "lost_trajectories" in name)
    kept = [key for key in issued.values() if key.prompt_id not in world.unwanted]
    assert times_trained(world) == Counter(kept)


async def test_a_filter_that_keeps_nothing_ends_the_run():
    told = []
    line = pipeline(Picky(*"01234"), on_drop=lambda issue, lost: told.append(issue))
    words = r"flow\.filter: the last 200 trajectories .* none was kept; .*: my:keep said no"

    with pytest.raises(NothingKeptError, match=words):
        await run(line)

    assert len(told) == line.ledger.num_filtered
    assert 200 <= len(told) <= 203, "those under way are settled too"
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_filter_that_keeps_little_ends_nothing():
    world = Picky()

    class Rarely(Picky):
        async def score(self, stored):
            self.unwanted = () if len(self.asked) % 100 == 99 else tuple("01234")
            return await super().score(stored)

    world = Rarely()
    await run(pipeline(world, batches=2))
    assert sum(world.asked.values()) >= 800 - 8


async def test_a_resumed_run_does_not_ask_again_what_was_filtered():
    first, second = Picky("1", "3"), Picky("1", "3")
    line = pipeline(first, staleness=2, lookahead=1)
    steps = line.steps(0)
    for _ in range(6):
        await anext(steps)

    await steps.aclose()
    ledger = Ledger.restore(**json.loads(json.dumps(line.ledger.state())))
    second.version = second.served = 6
    await run(pipeline(second, staleness=2, lookahead=1, ledger=ledger), start=6)

    filtered = {key for key in first.asked if key.prompt_id in first.unwanted}
    assert filtered and not filtered & {*second.asked}
    counts = times_trained(first, second)
    assert len(counts) == 48 and set(counts.values()) == {1}


async def test_a_batch_does_not_wait_for_what_replaces_a_dropped_one():
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


async def test_too_many_dropped_end_the_run_with_the_last_reason():
    world = Poisoned("3")
    dropped = r"3 trajectories were dropped after flow.max_attempts = 3 attempts"
    with pytest.raises(TooManyDroppedError, match=dropped):
        await run(pipeline(world, max_dropped=2))

    assert asyncio.all_tasks() == {asyncio.current_task()}
    reason = r"prompt_id='3'.*: teacher_failed: not finite"
    with pytest.raises(TooManyDroppedError, match=reason):
        await run(pipeline(Poisoned("3"), max_dropped=0))


@pytest.mark.parametrize("staleness", [1, 2])
async def test_a_step_that_has_begun_is_finished_before_the_run_ends(staleness):
    """Else a checkpoint of the learner would hold a step that nobody has counted."""

    class Fails(Poisoned):
        async def step(self, batch):
            self.is_stepping = True
            await asyncio.sleep(0.05)  # meanwhile one too many is dropped
            return await super().step(batch)

        async def generate(self, prompt, sample_index, sampling):
            while prompt.prompt_id == "3" and not hasattr(self, "is_stepping"):
                await asyncio.sleep(0.001)

            return await super().generate(prompt, sample_index, sampling)

    world = Fails("3")
    line = pipeline(world, staleness=staleness, lookahead=1, max_dropped=0)
    steps = []
    with pytest.raises(TooManyDroppedError):
        async for done in line.steps(0):
            steps.append(done.stats.version.step)

    assert steps == [1] and world.version == line.progress.step == 1
    assert len(line.ledger.settled) == 4 + len(line.ledger.dropped)


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
    assert dropped
    assert not set(first.tried) & set(second.tried)
    counts = times_trained(first, second)
    assert len(counts) == 48
    assert set(counts.values()) == {1}


@pytest.mark.parametrize("call", ["accumulate", "step"])
async def test_bodies_lost_before_the_update_are_sampled_again(call):
    class Forgetful(FakeWorld):
        gone = 3

        def forget(self, name, batch):
            if name == call and self.gone:
                self.gone -= 1
                raise BodiesLostError([stored.header.key for stored in batch.stored()][:1])

        async def accumulate(self, part):
            self.forget("accumulate", part)
            await super().accumulate(part)

        async def step(self, batch):
            self.forget("step", batch)
            return await super().step(batch)

    world = Forgetful()
    rows = await run(pipeline(world, max_attempts=1))
    assert rows[-1]['eopd_lost_trajectories_total{reason="body_lost"}'] == 3
    assert rows[-1]["eopd_dropped_trajectories_total"] == 0
    counts = times_trained(world)
    assert len(counts) == 48
    assert set(counts.values()) == {1}


class Slow(FakeWorld):
    """The last sample of every batch takes until ``may_end``."""

    def __init__(self) -> None:
        super().__init__()
        self.may_end = asyncio.Event()
        self.asked = 0

    async def generate(self, prompt, sample_index, sampling):
        self.asked += 1
        if self.asked % 4 == 0:
            await self.may_end.wait()

        return await super().generate(prompt, sample_index, sampling)


@pytest.mark.parametrize(
    ("plan", "begun"),
    [
        ({"ranks": 2}, 2),
        ({"ranks": 1}, 3),
        ({"ranks": 1, "token_budget": 16}, 2),
        ({"ranks": 2, "token_budget": 16}, 0),
        ({"ranks": 1, "streams": False}, 0),
    ],
)
async def test_a_batch_is_begun_while_the_rest_of_it_is_written(plan, begun):
    world = Slow()
    line = pipeline(world, batches=1, **plan)
    running = asyncio.create_task(run(line))
    await fakes.until(lambda: line.buffer.num_ready + line.buffer.num_taken == 3)
    await asyncio.sleep(0.05)
    assert sum(len(part.stored()) for part in world.parts) == begun
    assert world.trained == [] and world.version == 0
    world.may_end.set()
    (row,) = await running
    assert world.trained == [sorted(keys(line, 4))]
    assert row["eopd_train_seconds"] + row["eopd_wait_seconds"] > 0.04


async def test_one_that_is_stopped_in_the_middle_of_a_batch_has_not_trained_it():
    world = Slow()
    line = pipeline(world)
    running = asyncio.create_task(run(line))
    await fakes.until(lambda: line.buffer.num_ready + line.buffer.num_taken == 3)
    await fakes.until(lambda: bool(world.parts))
    assert "of 4 trajectories the learner has 2, and 1 are ready" in line.status()
    line.buffer.close()
    assert await running == []
    assert line.ledger.settled.floor == 0 and world.trained == []


class Publishing(FakeWorld):
    """The first publish sends, and ends, when it is told to; ``gone`` parts lose a body."""

    def __init__(self, gone: int = 0) -> None:
        super().__init__()
        self.may_send, self.may_end = asyncio.Event(), asyncio.Event()
        self.gone = gone
        self.failure: Exception | None = None

    async def publish(self, version, on_sent):
        await self.may_send.wait()
        on_sent()
        await self.may_end.wait()
        if self.failure:
            raise self.failure

        return await super().publish(version)

    async def accumulate(self, part):
        if self.version == 1 and self.gone:
            self.gone -= 1
            raise BodiesLostError([stored.header.key for stored in part.stored()][:1])

        await super().accumulate(part)

    def begun(self) -> int:
        return sum(len(part.stored()) for part in self.parts)


@pytest.mark.parametrize(("staleness", "begun"), [(0, 0), (1, 2), (2, 2)])
async def test_the_next_batch_is_begun_once_the_weights_are_sent(staleness, begun):
    """Parts are of two trajectories, and the last one of a batch waits for the engines."""
    world = Publishing()
    line = pipeline(world, staleness=staleness)
    running = asyncio.create_task(run(line))
    await fakes.until(lambda: world.version == 1)
    assert (world.version, world.served, world.begun()) == (1, 0, 0)
    world.may_send.set()
    await fakes.until(lambda: world.begun() == begun)
    await asyncio.sleep(0.05)
    assert (world.version, world.served, world.begun()) == (1, 0, begun)
    assert line.buffer.num_slots_held == line.buffer.num_slots
    world.may_end.set()
    rows = await running
    assert max(world.staleness) <= staleness
    assert world.trained == [sorted(keys(line, 48)[4 * n : 4 * n + 4]) for n in range(12)]
    assert rows[0]["eopd_weights_seconds"] > 0.045, "from the sending to the end of the publish"


@pytest.mark.parametrize("staleness", [0, 2])
async def test_the_stages_of_a_step_are_all_of_its_time_also_where_batches_overlap(staleness):
    class Slow(FakeWorld):
        async def accumulate(self, part):
            await asyncio.sleep(0.004)
            await super().accumulate(part)

        async def publish(self, version, on_sent):
            await asyncio.sleep(0.004)
            on_sent()
            await asyncio.sleep(0.01)
            return await super().publish(version)

    for row in await run(pipeline(Slow(), staleness=staleness, ranks=1)):
        parts = ("wait_rollout", "wait_teacher", "train", "weights")
        whole = sum(row[f"eopd_{part}_seconds"] for part in parts)
        assert whole == pytest.approx(row["eopd_step_seconds"], rel=0.02)


async def test_while_the_learner_trains_it_does_not_wait_for_weights():
    class Training(Publishing):
        async def accumulate(self, part):
            await super().accumulate(part)
            if self.version == 1 and not self.may_end.is_set():
                await asyncio.sleep(0.3)
                self.may_end.set()

    world = Training()
    world.may_send.set()
    row, *_ = await run(pipeline(world, staleness=2))
    assert row["eopd_train_seconds"] > 0.3 > row["eopd_weights_seconds"]


async def test_a_batch_that_was_begun_and_lost_a_body_is_begun_again():
    world = Publishing(gone=2)
    world.may_send.set()
    line = pipeline(world, staleness=2, max_attempts=1)
    running = asyncio.create_task(run(line))
    await fakes.until(lambda: world.gone == 0)
    world.may_end.set()
    rows = await running
    assert rows[-1]['eopd_lost_trajectories_total{reason="body_lost"}'] == 2
    assert set(times_trained(world).values()) == {1}
    assert len(times_trained(world)) == 48


async def test_a_publish_that_fails_while_the_next_batch_is_begun_ends_the_run():
    world = Publishing()
    world.failure = LearnerDownError("rank 1 died")
    world.may_send.set()
    running = asyncio.create_task(run(pipeline(world, staleness=2)))
    await fakes.until(lambda: world.begun() == 2)
    world.may_end.set()
    with pytest.raises(LearnerDownError, match="rank 1 died"):
        await running

    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_learner_that_is_lost_while_weights_are_published_ends_the_publish_too():
    class Lost(Publishing):
        async def accumulate(self, part):
            if self.version == 1:
                raise LearnerDownError("rank 1 died")

            await super().accumulate(part)

    world = Lost()
    world.may_send.set()
    with pytest.raises(LearnerDownError, match="rank 1 died"):
        await run(pipeline(world, staleness=2))

    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_one_that_is_stopped_while_weights_are_published_ends_with_that_step():
    world = Publishing()
    world.may_send.set()
    line = pipeline(world, staleness=2)
    running = asyncio.create_task(run(line))
    await fakes.until(lambda: world.version == 1)
    line.buffer.close()
    world.may_end.set()
    (row,) = await running
    assert row["eopd_step"] == 1
    assert line.ledger.settled.floor == 4 and len(world.trained) == 1


async def test_a_learner_that_raises_ends_the_run():
    class Broken(FakeWorld):
        async def step(self, batch):
            raise ArithmeticError("not finite")

    with pytest.raises(ArithmeticError, match="not finite"):
        await run(pipeline(Broken(), staleness=2))

    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_resumed_run_trains_what_an_undisturbed_run_trains():
    undisturbed = FakeWorld()
    first = FakeWorld()
    second = FakeWorld(seed=9)
    await run(pipeline(undisturbed, staleness=2, lookahead=1))
    line = pipeline(first, staleness=2, lookahead=1)
    steps = line.steps(0)
    for _ in range(5):
        await anext(steps)

    await steps.aclose()
    ledger = Ledger.restore(**line.ledger.state())
    second.version = second.served = 5
    await run(pipeline(second, staleness=2, lookahead=1, ledger=ledger), start=5)
    assert times_trained(first, second) == times_trained(undisturbed)


@pytest.mark.parametrize("batch", [2, 3, 7])
@pytest.mark.parametrize(
    "modes",
    [
        ((0, 0), (0, 0)),
        ((2, 1), (2, 1)),
        ((3, 2), (0, 0)),
        ((0, 0), (3, 1)),
    ],
)
async def test_a_run_may_go_on_with_another_batch_and_staleness(batch, modes):
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
    issued = keys(line, 5 * 4 + 7 * batch)
    assert times_trained(first, second) == Counter(issued)
