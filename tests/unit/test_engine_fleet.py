"""More or fewer engines on request: nobody is disturbed who may stay, and who does not start leaves nothing behind."""

import asyncio
from types import SimpleNamespace

import pytest

from eopd.config import load_config
from eopd.roles import EngineDownError
from eopd.runtime import engines as module
from eopd.runtime.engines import EngineFleet
from eopd.runtime.restarts import RestartBudget


class Channel:
    def __init__(self) -> None:
        self.joined, self.refuses = {0, 1}, False

    def leave(self, number):
        self.joined.discard(number)

    async def join(self, number, engine):
        if self.refuses:
            raise EngineDownError("it did not take the weights")
        self.joined.add(number)


@pytest.fixture
async def fleet(tmp_path, monkeypatch):
    path = tmp_path / "c.yaml"
    path.write_text(
        "run: {name: r, batches: 2}\nstudent: {model: s}\nteachers: [{model: t}]\nrollout: {engines: 2}\n"
        "prompts: {data: a, held_out: b}\nflow: {batch_prompts: 8}\ncluster: {start_timeout_s: 0.2}"
    )
    spawned, ended = [], []

    def actor():
        one = SimpleNamespace(hangs=False)

        async def start(*arguments):
            await asyncio.sleep(3600 if one.hangs else 0)

        one.start = SimpleNamespace(remote=start)
        return one

    def spawn(role, plan, numbers, **options):
        new = [actor() for _ in numbers]
        spawned.extend(new)
        return new

    async def end(one):
        ended.append(spawned.index(one))

    monkeypatch.setattr(module, "end", end)
    fleet = EngineFleet(spawn, load_config(path), RestartBudget(0, 1.0))
    fleet.channel, fleet.spawned, fleet.ended = Channel(), spawned, ended
    return fleet


async def test_those_that_were_there_stay_when_more_come_and_the_last_ones_go_first(fleet):
    await fleet.scale(4)
    assert (len(fleet.spawned), fleet.ended, fleet.channel.joined) == (4, [], {0, 1, 2, 3})
    assert fleet.num_engines == fleet.replicas.num_up == 4
    await fleet.scale(1)
    assert (sorted(fleet.ended), fleet.channel.joined) == ([1, 2, 3], {0})
    assert fleet.num_engines == fleet.replicas.num_up == 1
    await fleet.scale(2)
    assert fleet.channel.joined == {0, 1} and len(fleet.spawned) == 5


async def test_an_engine_that_does_not_start_is_ended_and_the_others_stay(fleet):
    fleet.channel.refuses = True
    with pytest.raises(EngineDownError):
        await fleet.scale(3)
    assert (fleet.ended, fleet.num_engines, fleet.replicas.num_up) == ([2], 2, 2)
    spawn = fleet._spawn

    def hanging(*arguments, **options):
        (one,) = spawn(*arguments, **options)
        one.hangs = True
        return [one]

    fleet._spawn = hanging
    with pytest.raises(TimeoutError):
        await fleet.scale(3)
    assert (fleet.ended, fleet.num_engines, fleet.replicas.num_up) == ([2, 3], 2, 2)
