"""Held-out measurement: the same prompts with the same seeds, whatever is lost on the way."""

from dataclasses import replace

import fakes
import pytest

from eopd.config import load_config
from eopd.evaluation.held_out import measure_held_out
from eopd.roles import BodiesLostError
from eopd.types import EvalStats, LostReason, LostTrajectory, TrajectoryKey

STATS = EvalStats(
    by_prompt={"tokens": dict.fromkeys("abc", 3.0)},
    student_entropy_counts=(),
    teacher_entropy_counts=(),
)

PROMPTS = [fakes.prompt(name) for name in "abc"]


class World(fakes.World):
    """What is in ``loses`` is lost so many times."""

    def __init__(self, **loses: int) -> None:
        super().__init__()
        self.loses, self.asked, self.measured, self.gone = loses, [], None, ()

    def lost(self, key, role):
        name = f"{role}_{key.prompt_id}"
        self.loses[name] = self.loses.get(name, 0) - 1
        if self.loses[name] >= 0:
            return LostTrajectory(
                key=key, reason=LostReason.TEACHER_FAILED, detail="its body was lost"
            )

        return None

    async def generate(self, prompt, sample_index, sampling):
        self.asked.append((prompt.prompt_id, sampling.seed, sampling.temperature))
        written = self.write(prompt, sample_index, 0)
        return self.lost(written.header.key, "write") or written

    async def score(self, stored):
        return self.lost(stored.header.key, "score") or stored

    async def evaluate(self, batch):
        self.measured = sorted(stored.header.key.prompt_id for stored in batch.stored())
        if self.gone:
            keys, self.gone = self.gone, ()
            raise BodiesLostError(keys)

        return replace(STATS, by_prompt={"tokens": dict.fromkeys(self.measured, 3.0)})


@pytest.fixture
def run(tmp_path):
    """Measures the first three of four prompts; returns the outcome, and what was said and shown."""
    defaults = [
        "rollout.temperature=0.7",
        "evaluation={prompts: 3, seed: 40, max_response_tokens: 4}",
        "flow.max_attempts=3",
        "learner.ranks=2",
    ]

    async def measured(world, *settings):
        config = load_config(fakes.write_config(tmp_path), [*defaults, *settings])
        said, done = [], []
        outcome = await measure_held_out(
            world,
            world,
            world,
            [*PROMPTS, fakes.prompt("d")],
            config,
            when="before training",
            say=said.append,
            doing=done.append,
        )
        return outcome, said, done

    return measured


DROPPED = (
    "held-out prompts could not be measured before training: their responses are lost, or their "
    "numbers not finite"
)
FIRST = "measuring on 3 held-out prompts, before training"


async def test_what_is_lost_is_written_again_with_the_same_seed(run):
    world = World(write_a=1, score_b=2)
    (stats, scored), said, done = await run(world)
    assert stats == STATS and world.measured == ["a", "b", "c"]
    assert [stored.header.key.prompt_id for stored in scored] == ["a", "b", "c"]
    expected = [("a", 40, 0.7)] * 2 + [("b", 41, 0.7)] * 3 + [("c", 42, 0.7)]
    assert sorted(world.asked) == expected
    assert said == [FIRST]
    assert done == [f"held-out prompts written and read: {n}/3" for n in (1, 2, 3)]


async def test_seeds_begin_again_behind_the_largest(run):
    world = World()
    await run(world, f"evaluation.seed={2**64 - 2}")
    assert sorted(world.asked) == [("a", 2**64 - 2, 0.7), ("b", 2**64 - 1, 0.7), ("c", 0, 0.7)]


async def test_a_prompt_that_is_always_lost_is_left_out_and_counted(run):
    world = World(score_c=3)
    (stats, scored), said, _ = await run(world)
    assert world.measured == ["a", "b"] == [stored.header.key.prompt_id for stored in scored]
    assert (stats.num_prompts, stats.num_dropped) == (2, 1)
    assert said == [FIRST, f"1 of 3 {DROPPED}"]


async def test_without_a_single_response_nothing_is_measured(run):
    outcome, said, _ = await run(World(score_a=3, write_b=3, score_c=3))
    assert outcome is None
    assert said[-1].startswith("not measured before training: no held-out prompt could be")
    assert "its body was lost" in said[-1]


@pytest.mark.parametrize("num_finite", [2, 0])
async def test_a_prompt_whose_numbers_are_not_finite_is_counted_too(run, monkeypatch, num_finite):
    finite = replace(STATS, by_prompt={"tokens": dict.fromkeys("abc"[:num_finite], 3.0)})
    world = World()

    async def evaluate(batch):
        return replace(finite, num_dropped=3 - num_finite)

    monkeypatch.setattr(world, "evaluate", evaluate)
    outcome, said, _ = await run(world)
    assert said[-1] == f"{3 - num_finite} of 3 {DROPPED}"
    assert outcome is None if not num_finite else outcome[0] == replace(finite, num_dropped=1)


async def test_bodies_that_are_lost_before_they_are_measured_are_written_again(run):
    world = World()
    world.gone = [TrajectoryKey(0, "b", 0)]
    (stats, scored), _, _ = await run(world)
    assert stats == STATS and [stored.header.key.prompt_id for stored in scored] == ["a", "b", "c"]
    assert sorted(name for name, *_ in world.asked) == ["a", "b", "b", "c"]
