"""Beside the loop: a watchdog that says who waits for whom, and engines that come and go on request."""

import asyncio
import json

import pytest

from eopd.config import ConfigError, load_config
from eopd.replicas import ReplicaFailedError, Replicas
from eopd.roles import EngineDownError
from eopd.runtime import beside
from eopd.runtime.beside import StallError, Watchdog, scale_on_request
from eopd.runtime.lock import Holder
from eopd.runtime.restarts import RestartBudget
from eopd.runtime.run_directory import RunDirectory


async def for_a_while(coroutine, seconds: float) -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(coroutine, seconds)


async def test_a_stall_is_told_once_per_interval_and_a_step_ends_it():
    told = []
    watchdog = Watchdog(0.2, "report", lambda: ["loop: waiting for a batch", "rollout engine 0: 3 in flight"])
    await for_a_while(watchdog.watch(told.append), 0.75)
    assert len(told) == 3
    assert told[0].splitlines() == [
        "no step has finished for 0 s:",
        "  loop: waiting for a batch",
        "  rollout engine 0: 3 in flight",
    ]
    assert told[2].startswith("no step has finished for 1 s:"), "since the step, not since the last report"

    async def steps():
        while True:
            watchdog.step()
            await asyncio.sleep(0.05)

    told.clear()
    stepping = asyncio.create_task(steps())
    await for_a_while(watchdog.watch(told.append), 0.6)
    stepping.cancel()
    assert told == []


async def test_a_stall_ends_the_run_where_it_is_told_to():
    watchdog = Watchdog(0.1, "end", lambda: ["weights: sending, 2 engines"])
    budget = RestartBudget(0, 1.0)
    with pytest.raises(StallError, match=r"for 0 s:\n  weights: sending, 2 engines\n  run.on_stall"):
        await asyncio.wait_for(budget.guard(asyncio.sleep(3600), watchdog.watch(pytest.fail)), 5.0)


async def test_what_goes_on_beside_ends_with_the_work():
    ended = []

    async def beside_it():
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    assert await RestartBudget(0, 1.0).guard(asyncio.sleep(0.01, "done"), beside_it()) == "done"
    assert ended == [True]


async def never(index, reason):
    pytest.fail(f"replaced {index}: {reason}")


async def test_a_worker_that_drains_ends_what_it_has_and_gets_no_more():
    gate = asyncio.Event()

    async def slow(worker):
        await gate.wait()
        return worker

    async def quick(worker):
        return worker

    replicas = Replicas("engine", ["a", "b"], replace=never, timeout_s=5.0)
    first, second = (asyncio.create_task(replicas.attempt(slow, [])) for _ in range(2))
    await asyncio.sleep(0)
    draining = asyncio.create_task(replicas.drain(1))
    await asyncio.sleep(0.01)
    assert replicas.status() == [
        "engine 0: 1 in flight, the oldest for 0 s",
        "engine 1: 1 in flight, the oldest for 0 s, takes no work (draining)",
    ]
    assert replicas.num_up == 1 and not draining.done()
    assert [await replicas.attempt(quick, []) for _ in range(3)] == ["a"] * 3
    gate.set()
    assert {await first, await second} == {"a", "b"}
    await draining
    replicas.add(1, "c")
    replicas.add(2, "d")
    assert replicas.num_up == 3 and [await replicas.attempt(quick, [0, 1]) for _ in range(2)] == ["d", "d"]


async def test_a_worker_that_dies_while_it_drains_is_not_replaced():
    gate = asyncio.Event()

    async def dies(worker):
        await gate.wait()
        raise EngineDownError("killed")

    replicas = Replicas("engine", ["a", "b"], replace=never, timeout_s=5.0)
    work = asyncio.create_task(replicas.attempt(dies, [0]))
    await asyncio.sleep(0)
    draining = asyncio.create_task(replicas.drain(1))
    await asyncio.sleep(0.01)
    gate.set()
    with pytest.raises(ReplicaFailedError):
        await work
    await draining
    assert replicas.status() == ["engine 0: 0 in flight"]


async def test_a_worker_that_hangs_while_it_drains_is_let_go_once_it_is_condemned():
    replicas = Replicas("engine", ["a", "b"], replace=never, timeout_s=3600.0)
    hanging = asyncio.create_task(replicas.attempt(lambda worker: asyncio.sleep(3600), [0]))
    await asyncio.sleep(0)
    draining = asyncio.create_task(replicas.drain(1))
    await asyncio.sleep(0.01)
    replicas.condemn(1, "it does not answer")
    await asyncio.wait_for(draining, 2.0)
    hanging.cancel()
    replicas.condemn(1, "again, and it is gone")
    assert replicas.status() == ["engine 0: 0 in flight"]


@pytest.fixture
def directory(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        f"run: {{name: r, batches: 2, directory: {tmp_path}/runs}}\nstudent: {{model: s}}\nteachers: [{{model: t}}]\n"
        "prompts: {data: a, held_out: b}\nflow: {batch_prompts: 8}"
    )
    return RunDirectory.create(load_config(path))


class Fleet:
    """Starts one engine at a time; those in ``fails`` do not start the first time."""

    def __init__(self, num_engines: int, fails: set[int] = frozenset()) -> None:
        self.num_engines, self.fails = num_engines, set(fails)

    async def scale(self, num_engines: int) -> None:
        self.num_engines = min(self.num_engines, num_engines)
        while self.num_engines < num_engines:
            if self.num_engines in self.fails:
                self.fails.remove(self.num_engines)
                raise TimeoutError
            self.num_engines += 1


async def test_the_run_gets_the_engines_that_are_asked_for(directory, monkeypatch):
    monkeypatch.setattr(beside, "POLL_S", 0.01)
    monkeypatch.setattr(beside, "RETRY_S", 0.05)
    fleet, told = Fleet(2, fails={3}), []
    following = asyncio.create_task(scale_on_request(directory, fleet, told.append))
    await asyncio.sleep(0.05)
    assert told == [], "nobody asked"
    directory.write_summary({"status": "running"})
    monkeypatch.setattr("eopd.runtime.run_directory.holder", lambda path: Holder(host="h", pid=7, since=0.0))
    directory.ask_for_engines(4)
    await asyncio.sleep(0.3)
    assert fleet.num_engines == 4 and told == [
        "from 2 rollout engines to 4",
        "3 rollout engines, no more: TimeoutError; trying again in 0 s",
        "from 3 rollout engines to 4",
        "4 rollout engines",
    ]
    directory.ask_for_engines(1)
    await asyncio.sleep(0.1)
    assert fleet.num_engines == 1 and told[-1] == "1 rollout engines"
    following.cancel()


def test_only_a_run_that_is_running_can_be_scaled_and_a_wish_is_forgotten_with_its_process(
    directory, tmp_path, monkeypatch
):
    me = Holder(host="h", pid=7, since=0.0)
    monkeypatch.setattr("eopd.runtime.run_directory.holder", lambda path: me if path.exists() else None)
    with pytest.raises(ConfigError, match="is starting: only a run that is running can be scaled"):
        directory.ask_for_engines(3)
    with pytest.raises(ConfigError, match="holds no run"):
        RunDirectory(tmp_path / "elsewhere").ask_for_engines(3)
    directory.write_summary({"status": "running"})
    directory.ask_for_engines(3)
    assert directory.engines_asked_for() == 3
    directory.write_summary({"status": "completed"})
    with pytest.raises(ConfigError, match="is completed"):
        directory.ask_for_engines(4)
    assert json.loads((directory.path / "scale.json").read_text()) == {"engines": 3}
    assert RunDirectory.create(directory.config()).engines_asked_for() is None
