"""Held-out measurement: the same prompts with the same seeds, whatever is lost on the way."""

import fakes
import pytest

from eopd.evaluation.held_out import measure
from eopd.types import LossReason, LostTrajectory

PROMPTS = [fakes.prompt(name) for name in "abc"]


class World(fakes.World):
    """What is in ``loses`` is lost so many times."""

    def __init__(self, **loses: int) -> None:
        super().__init__()
        self.loses, self.asked, self.measured = loses, [], None

    def lost(self, key, role):
        name = f"{role}_{key.prompt_id}"
        self.loses[name] = self.loses.get(name, 0) - 1
        if self.loses[name] >= 0:
            return LostTrajectory(key=key, reason=LossReason.TEACHER_FAILED, detail="its body was lost")
        return None

    async def generate(self, prompt, sample_index, sampling):
        self.asked.append((prompt.prompt_id, sampling.seed, sampling.temperature))
        written = self.write(prompt, sample_index, 0)
        return self.lost(written.header.key, "write") or written

    async def score(self, stored):
        return self.lost(stored.header.key, "score") or stored

    async def evaluate(self, batch):
        self.measured = sorted(stored.header.key.prompt_id for stored in batch.stored())
        return "stats"


async def run(world: World, **more):
    settings = {
        "temperature": 0.7,
        "max_tokens": 4,
        "seed": 40,
        "max_attempts": 3,
        "ranks": 2,
        "token_budget": 100,
        **more,
    }
    return await measure(world, world, world, PROMPTS, **settings)


async def test_what_is_lost_is_written_again_with_the_same_seed():
    world = World(write_a=1, score_b=2)
    stats, scored = await run(world)
    assert stats == "stats" and world.measured == ["a", "b", "c"]
    assert [stored.header.key.prompt_id for stored in scored] == ["a", "b", "c"]
    expected = [("a", 40, 0.7)] * 2 + [("b", 41, 0.7)] * 3 + [("c", 42, 0.7)]
    assert sorted(world.asked) == expected


async def test_it_is_told_how_far_it_is():
    told = []
    await run(World(write_a=1, score_b=2), tell=told.append)
    assert told == [1, 2, 3]


async def test_a_prompt_that_is_always_lost_ends_the_measurement():
    world = World(score_c=3)
    with pytest.raises(
        RuntimeError, match="held-out prompt c was lost 3 times, last: teacher_failed: its body was lost"
    ):
        await run(world)
    assert world.measured is None
