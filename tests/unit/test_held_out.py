"""Held-out measurement: the same prompts with the same seeds, whatever is lost on the way."""

import numpy as np
import pytest

from eopd.evaluation.held_out import measure
from eopd.types import Header, LossReason, LostTrajectory, PromptSample, StopReason, Stored, TrajectoryKey

PROMPTS = [
    PromptSample(epoch=0, prompt_id=name, source="s", token_ids=np.arange(2), reference_answer=None) for name in "abc"
]


class World:
    """Every role; what is in ``loses`` is lost so many times."""

    def __init__(self, **loses: int) -> None:
        self.loses, self.asked, self.measured = loses, [], None

    def lost(self, key, role):
        name = f"{role}_{key.prompt_id}"
        self.loses[name] = self.loses.get(name, 0) - 1
        if self.loses[name] >= 0:
            return LostTrajectory(key=key, reason=LossReason.TEACHER_FAILED, detail="its body was lost")
        return None

    async def generate(self, prompt, sample_index, sampling):
        self.asked.append((prompt.prompt_id, sampling.seed, sampling.temperature))
        key = TrajectoryKey(0, prompt.prompt_id, sample_index)
        header = Header(
            key=key,
            source="s",
            num_prompt_tokens=2,
            num_response_tokens=4,
            num_loss_tokens=4,
            stop_reason=StopReason.LENGTH,
            oldest_version=0,
            newest_version=0,
            sums={},
            response_crc32=0,
        )
        return self.lost(key, "write") or Stored(header, None)

    async def score(self, stored):
        return self.lost(stored.header.key, "score") or stored

    async def evaluate(self, batch):
        self.measured = sorted(stored.header.key.prompt_id for stored in batch.stored())
        return "stats"


async def run(world: World, **more):
    settings = {"max_tokens": 4, "seed": 40, "max_attempts": 3, "ranks": 2, "token_budget": 100, **more}
    return await measure(world, world, world, PROMPTS, **settings)


async def test_what_is_lost_is_written_again_with_the_same_seed():
    world = World(write_a=1, score_b=2)
    stats, scored = await run(world)
    assert stats == "stats" and world.measured == ["a", "b", "c"]
    assert [stored.header.key.prompt_id for stored in scored] == ["a", "b", "c"]
    expected = [("a", 40, 1.0)] * 2 + [("b", 41, 1.0)] * 3 + [("c", 42, 1.0)]
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
