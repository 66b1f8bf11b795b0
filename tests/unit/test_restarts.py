"""A run survives so many failures within a window, and says which when it does not."""

import asyncio
from types import SimpleNamespace

import pytest

from eopd.runtime import restarts as module
from eopd.runtime.restarts import RestartBudget, TooManyRestartsError


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
