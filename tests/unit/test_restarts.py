"""A run survives so many failures within a window; and engines that die cost no prompt."""

import asyncio
from types import SimpleNamespace

import pytest

from eopd.replicas import Replicas
from eopd.roles import EngineDownError
from eopd.rollout.pool import EnginePool
from eopd.runtime import restarts as module
from eopd.runtime.restarts import RestartBudget, TooManyRestartsError
from eopd.types import LossReason, LostTrajectory, PromptSample, Sampling


async def test_one_restart_too_many_names_the_causes():
    budget = RestartBudget(2, 60.0)
    budget.spend("engine 0: died")
    budget.spend("engine 0: died")
    with pytest.raises(TooManyRestartsError, match=r"3 failures within 60 s.*is 2:\n  2 x engine 0: died\n  1 x other"):
        budget.spend("other")
    with pytest.raises(TooManyRestartsError):
        await budget.guard(asyncio.sleep(0))


async def test_what_is_long_past_does_not_count(monkeypatch):
    clock = iter([0.0, 50.0, 61.0, 62.0])
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    budget = RestartBudget(2, 60.0)
    for _ in range(3):
        budget.spend("x")
    with pytest.raises(TooManyRestartsError):
        budget.spend("x")


async def test_work_is_cancelled_by_one_restart_too_many_wherever_it_is_counted():
    budget, ended = RestartBudget(0, 60.0), []

    async def work():
        try:
            await asyncio.sleep(3600)
        finally:
            ended.append(True)

    async def elsewhere():
        await asyncio.sleep(0.01)
        budget.spend("an engine")

    counting = asyncio.create_task(elsewhere())
    with pytest.raises(TooManyRestartsError, match="an engine"):
        await budget.guard(work())
    assert ended == [True]
    await asyncio.gather(counting, return_exceptions=True)


async def test_undisturbed_work_gives_its_result_and_its_error():
    async def fail():
        raise ValueError("mine")

    budget = RestartBudget(0, 60.0)
    assert await budget.guard(asyncio.sleep(0, "done")) == "done"
    with pytest.raises(ValueError, match="mine"):
        await budget.guard(fail())


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


PROMPT = PromptSample(epoch=1, prompt_id="p", source="s", token_ids=None, reference_answer=None)
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
    }


async def test_a_prompt_that_no_engine_survives_is_lost_with_its_reason():
    engines = [Engine(name, down=True) for name in "abc"]
    lost = await pool_of(*engines, attempts=2).generate(PROMPT, 3, SAMPLING)
    assert isinstance(lost, LostTrajectory)
    assert (lost.key, lost.reason) == ((1, "p", 3), LossReason.ROLLOUT_FAILED)
    assert lost.detail == "2 engines did not answer, last: b died"
