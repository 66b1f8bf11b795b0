"""Beside the loop: a watchdog that says who waits for whom, and engines that come and go on
request.
"""

import asyncio
import json

import fakes
import pytest

from eopd.config import ConfigError, load_config
from eopd.run.directory import RunDirectory
from eopd.run.lock import Holder
from eopd.run.record import Summary
from eopd.runtime import engines
from eopd.runtime.engines import scale_on_request
from eopd.runtime.watchdog import StallError, Watchdog, with_background


async def for_a_while(coroutine, seconds: float) -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(coroutine, seconds)


async def test_a_stall_is_told_once_per_interval_and_a_step_ends_it():
    told = []
    watchdog = Watchdog(0.2, "report")

    def status():
        return ["loop: waiting for a batch", "rollout engine 0: 3 in flight"]

    watching = asyncio.create_task(watchdog.watch(status, told.append))
    async with asyncio.timeout(10.0):
        while len(told) < 3:
            await asyncio.sleep(0.01)

    watching.cancel()
    assert told[0].splitlines() == [
        "no step has finished for 0 s:",
        "  loop: waiting for a batch",
        "  rollout engine 0: 3 in flight",
    ]
    assert told[2].startswith("no step has finished for 1 s:"), (
        "since the step, not since the last report"
    )

    async def steps():
        while True:
            watchdog.step()
            await asyncio.sleep(0.05)

    told.clear()
    stepping = asyncio.create_task(steps())
    await for_a_while(watchdog.watch(status, told.append), 0.6)
    stepping.cancel()
    assert told == []


async def test_a_stall_ends_the_run_where_it_is_told_to():
    watching = Watchdog(0.1, "end").watch(lambda: ["weights: sending, 2 engines"], pytest.fail)
    with pytest.raises(
        StallError, match=r"for 0 s:\n  weights: sending, 2 engines\n  run.on_stall"
    ):
        await asyncio.wait_for(with_background(asyncio.sleep(3600), watching), 5.0)


async def test_what_goes_on_beside_ends_with_the_work():
    ended = []

    async def beside_it():
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    assert await with_background(asyncio.sleep(0.01, "done"), beside_it()) == "done"
    assert ended == [True]


async def test_work_that_fails_is_told_and_so_is_what_fails_beside_it():
    async def fails():
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        await with_background(fails(), asyncio.sleep(3600))

    with pytest.raises(ValueError, match="mine"):
        await with_background(asyncio.sleep(3600), fails())


@pytest.fixture
def directory(tmp_path):
    config = load_config(fakes.write_config(tmp_path))
    return RunDirectory.create(config)


class Fleet:
    """Starts one engine at a time; those in ``fails`` do not start the first time."""

    def __init__(self, size: int, fails: set[int] = frozenset()) -> None:
        self.size, self.fails = size, set(fails)

    async def scale(self, size: int) -> None:
        self.size = min(self.size, size)
        while self.size < size:
            if self.size in self.fails:
                self.fails.remove(self.size)
                raise OSError("CUDA out of memory")

            self.size += 1


async def test_the_run_gets_the_engines_that_are_asked_for(directory, monkeypatch):
    monkeypatch.setattr(engines, "POLL_S", 0.01)
    monkeypatch.setattr(engines, "RETRY_S", 0.05)
    fleet, told = Fleet(2, fails={3}), []
    following = asyncio.create_task(scale_on_request(directory, fleet, told.append))
    await asyncio.sleep(0.05)
    assert told == [], "nobody asked"
    directory.write_summary(Summary(status="running"))
    monkeypatch.setattr(
        "eopd.run.directory.holder", lambda path: Holder(host="h", pid=7, since=0.0)
    )
    directory.ask_for_engines(4)
    async with asyncio.timeout(10.0):
        while len(told) < 4:
            await asyncio.sleep(0.01)

    assert fleet.size == 4
    assert told == [
        "from 2 rollout engines to 4",
        "3 rollout engines, no more: CUDA out of memory; trying again in 0 s",
        "from 3 rollout engines to 4",
        "4 rollout engines",
    ]
    directory.ask_for_engines(1)
    async with asyncio.timeout(10.0):
        while told[-1] != "1 rollout engines":
            await asyncio.sleep(0.01)

    assert fleet.size == 1
    following.cancel()


def test_only_a_run_that_is_running_can_be_scaled(directory, tmp_path, monkeypatch):
    me = Holder(host="h", pid=7, since=0.0)
    monkeypatch.setattr("eopd.run.directory.holder", lambda path: me if path.exists() else None)
    with pytest.raises(ConfigError, match="is starting: only a run that is running can be scaled"):
        directory.ask_for_engines(3)

    with pytest.raises(ConfigError, match="holds no run"):
        RunDirectory(tmp_path / "elsewhere").ask_for_engines(3)

    directory.write_summary(Summary(status="running"))
    directory.ask_for_engines(3)
    assert directory.engines_asked_for() == 3
    directory.write_summary(Summary(status="completed"))
    with pytest.raises(ConfigError, match="is completed"):
        directory.ask_for_engines(4)

    assert json.loads((directory.path / "scale.json").read_text()) == {"engines": 3}
    for broken in ("", "{", "[3]", '{"engines": "3"}', '{"engines": 0}', '{"engine": 3}'):
        (directory.path / "scale.json").write_text(broken + "\n")
        assert directory.engines_asked_for() is None, broken

    assert RunDirectory.create(directory.config()).engines_asked_for() is None
