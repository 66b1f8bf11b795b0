"""Engines that die cost no prompt."""

import asyncio

import fakes

from eopd.replicas import Replicas
from eopd.roles import EngineDownError
from eopd.rollout.pool import EnginePool
from eopd.types import LossReason, LostTrajectory, Sampling


class Engine:
    def __init__(self, name: str, down: bool = False) -> None:
        self.name, self.down, self.seeds = name, down, []

    async def generate(self, prompt, sample_index, sampling):
        self.seeds.append(sampling.seed)
        if self.down:
            raise EngineDownError(f"{self.name} died")
        return self.name


def pool_of(*engines: Engine, attempts: int = 3) -> EnginePool:
    async def replace(index, reason):
        return Engine(f"new {index} after {reason}")

    return EnginePool(Replicas("rollout", engines, replace=replace, timeout_s=1.0), max_attempts=attempts)


PROMPT = fakes.prompt(epoch=1)
SAMPLING = Sampling(temperature=1.0, max_tokens=4, seed=11)


async def test_a_prompt_of_a_dead_engine_is_written_elsewhere_with_the_same_seed():
    dead, well = Engine("a", down=True), Engine("b")
    pool = pool_of(dead, well)
    assert await pool.generate(PROMPT, 0, SAMPLING) == "b"
    assert dead.seeds == well.seeds == [11]
    await asyncio.sleep(0.01)
    assert await pool.generate(PROMPT, 0, SAMPLING) in ("new 0 after a died", "b")
    assert pool.metrics() == {
        "eopd_engine_failures_total": 1.0,
        "eopd_engine_replacements_total": 1.0,
        "eopd_engines_up": 2.0,
        'eopd_engine_in_flight_trajectories{engine="0"}': 0.0,
        'eopd_engine_in_flight_trajectories{engine="1"}': 0.0,
    }


async def test_a_prompt_that_no_engine_survives_is_lost_with_its_reason():
    engines = [Engine(name, down=True) for name in "abc"]
    lost = await pool_of(*engines, attempts=2).generate(PROMPT, 3, SAMPLING)
    assert isinstance(lost, LostTrajectory)
    assert (lost.key, lost.reason) == ((1, "p", 3), LossReason.ROLLOUT_FAILED)
    assert lost.detail == "2 engines did not answer, last: b died"
