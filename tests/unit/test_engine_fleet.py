"""More or fewer engines on request: nobody is disturbed who may stay, and who does not start leaves nothing behind."""

import asyncio
from types import SimpleNamespace

import pytest
from ray.exceptions import OutOfMemoryError

from eopd.config import load_config
from eopd.roles import EngineDownError, LearnerDownError
from eopd.runtime import engines as module
from eopd.runtime.engines import EngineFleet
from eopd.runtime.restarts import RestartBudget


class Channel:
    def __init__(self) -> None:
        self.joined, self.errors = {0, 1}, []

    async def part(self, number):
        self.joined.discard(number)

    async def join(self, number, engine):
        if self.errors:
            raise self.errors.pop()
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
        one = SimpleNamespace(start_s=0.0, error=None)

        async def start(*arguments):
            await asyncio.sleep(one.start_s)
            if one.error:
                raise one.error

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
    fleet.channel.errors = [EngineDownError("it did not take the weights")]
    with pytest.raises(EngineDownError):
        await fleet.scale(3)
    assert (fleet.ended, fleet.num_engines, fleet.replicas.num_up) == ([2], 2, 2)
    spawn = fleet._spawn
    for faults, error in (
        ({"start_s": 3600.0}, TimeoutError),
        ({"error": OutOfMemoryError("killed by the node's memory monitor")}, EngineDownError),
    ):

        def spoiled(*arguments, faults=faults, **options):
            (one,) = spawn(*arguments, **options)
            vars(one).update(faults)
            return [one]

        fleet._spawn = spoiled
        with pytest.raises(error):
            await fleet.scale(3)
    assert (fleet.ended, fleet.num_engines, fleet.replicas.num_up) == ([2, 3, 4], 2, 2)


async def test_a_new_engine_waits_for_a_learner_that_is_being_started_again(fleet, monkeypatch):
    monkeypatch.setattr(module, "_JOIN_AGAIN_S", 0.01)
    fleet.channel.errors = [LearnerDownError("rank 0 died")] * 3
    await fleet.scale(3)
    assert (fleet.ended, fleet.channel.joined, len(fleet.spawned)) == ([], {0, 1, 2}, 3)


async def test_an_engine_that_is_of_no_use_goes_first(fleet, monkeypatch):
    hang = asyncio.Event()

    async def never(index, reason):
        await hang.wait()

    fleet.replicas._replace = never
    fleet.replicas.condemn(0, "its node is gone")
    await fleet.scale(1)
    assert (fleet.ended, fleet.channel.joined, fleet.replicas.num_up) == ([0], {1}, 1)
