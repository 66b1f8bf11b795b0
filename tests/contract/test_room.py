"""A real cluster: a run waits for room until others have ended, and its actors get their nodes."""

import asyncio
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import fakes
import pytest
import ray
from ray import cloudpickle
from ray.cluster_utils import Cluster

from eopd.config import ClusterConfig, ConfigError, load_config
from eopd.fleet import Fleet
from eopd.pool import Pool
from eopd.roles import EngineDownError
from eopd.runtime import cluster, supervisor
from eopd.runtime import gang as gang_module
from eopd.runtime.actors import ActorProcess
from eopd.runtime.placement import RoleResources

# workers do not find the tests' modules
cloudpickle.register_pickle_by_value(sys.modules[__name__])

ROLES = [
    RoleResources(role="learner", actors=2, cpus=0.5, gpus=0.0, env={}),
    RoleResources(role="teacher served", actors=1, cpus=0.0, gpus=0.0, env={}),
    RoleResources(role="rollout", actors=1, cpus=1.0, gpus=0.0, env={}),
]


class Other:
    def __init__(self, name=""):
        pass

    def node(self):
        return ray.get_runtime_context().get_node_id()

    def close(self):
        pass


@pytest.fixture
def other(monkeypatch):
    """A cluster of two CPUs, and an actor of somebody else that holds one of them."""
    monkeypatch.setattr(cluster, "SETTLE_S", 0.5)
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        actor = ray.remote(num_cpus=1)(Other).remote()
        ray.get(actor.node.remote())
        yield actor
    finally:
        ray.shutdown()


@pytest.mark.timeout(120)
def test_room_that_others_give_back_is_waited_for_and_stays_free(other):
    said = []
    joined = ray.get_runtime_context().gcs_address
    with pytest.raises(ConfigError, match=r"1 of 2 are free \(1 are held by others\)$"):
        cluster.require_room(ROLES, ClusterConfig(address=joined, wait_s=1), said.append)

    ends = threading.Timer(3.0, ray.kill, [other])
    ends.start()
    cluster.require_room(ROLES, ClusterConfig(address=joined, wait_s=60), said.append)
    assert ends.finished.is_set()
    assert [line.split(" s (")[0] for line in said] == [
        f"waiting for room, for up to {seconds}" for seconds in (1, 60)
    ]
    cluster.require_room(ROLES, ClusterConfig())


class Rank(Other):
    def ping(self):
        pass

    def rendezvous(self):
        return "127.0.0.1", 1

    def start(self, *arguments):
        pass


class Engine(Other):
    def start(self, begun):
        """Starts at once; or says so with a file and never ends."""
        if begun is not None:
            begun.touch()
            time.sleep(3600.0)

        return 1


@pytest.mark.timeout(240)
async def test_a_rank_takes_the_room_of_an_engine_that_is_still_starting(
    other, tmp_path, monkeypatch
):
    """Both were lost with their machine; what is left is one CPU, and the engine was quicker."""

    async def until(condition):
        while not condition():
            await asyncio.sleep(0.1)

    monkeypatch.setattr(gang_module, "LearnerActor", Rank)
    monkeypatch.setattr(gang_module, "_ROOM_S", 3.0)
    settings = ["learner.ranks=1", "learner.cpus=1", "cluster.start_timeout_s=100"]
    config = load_config(fakes.write_config(tmp_path), settings)
    engine = RoleResources(role="rollout", actors=1, cpus=1.0, gpus=0.0, env={})
    begun, said = tmp_path / "begun", []
    starts = iter([None, begun])

    async with supervisor._actors() as spawn:

        def processes(numbers):
            actors = spawn(Engine, engine, numbers)
            return [ActorProcess(one, one, EngineDownError, next(starts, None)) for one in actors]

        pool = Pool("engine", timeout_s=60.0, ping=lambda worker: asyncio.sleep(0))
        fleet = Fleet(
            pool,
            spawn=processes,
            size=1,
            count_loss=said.append,
            start_timeout_s=200.0,
            log=said.append,
        )
        await asyncio.gather(*fleet.start().values())
        pool.lose(0, "its machine is gone")
        await until(begun.exists)

        gang = gang_module.LearnerGang(spawn, config)

        @contextmanager
        def give_way(num_ranks):
            assert not cluster.has_room(replace(engine, actors=num_ranks))
            with fleet.give_way():
                yield

        gang.give_way = give_way
        await gang.start(1)
        assert any("it gives way to others, who find no room" in line for line in said)
        assert pool.num_up == 0

        ray.kill(other)
        await until(lambda: pool.num_up == 1)
        await gang._actors[0].ping.remote()
        await fleet.close()


@pytest.fixture
def two_nodes():
    """A head of one CPU, and a node of three with a label."""
    nodes = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    try:
        nodes.add_node(num_cpus=3, labels={"pool": "large"})
        ray.init(nodes.address, log_to_driver=False)
        yield
    finally:
        ray.shutdown()
        nodes.shutdown()


@pytest.mark.timeout(120)
async def test_actors_start_on_their_nodes_or_where_there_is_room(two_nodes):
    learner = RoleResources(role="learner", actors=2, cpus=1.0, gpus=0.0, env={})
    engine = RoleResources(role="rollout", actors=1, cpus=1.0, gpus=0.0, env={})
    places = cluster.find_places([engine, learner])
    expected = [places[name] for name in (("learner", 0), ("learner", 1), ("rollout", 0))]
    assert expected[0] == expected[1]

    async with supervisor._actors({**places, ("rollout", 1): expected[2]}) as spawn:
        actors = [*spawn(Other, learner, range(2)), *spawn(Other, engine, [0])]
        assert await asyncio.gather(*(actor.node.remote() for actor in actors)) == expected

        # whose node is full by now, and who replaces somebody
        others = [*spawn(Other, engine, [1])]
        assert await others[0].node.remote() != expected[2]


@pytest.mark.timeout(120)
async def test_who_wants_a_label_starts_there_and_waits_there_for_room(two_nodes):
    labels = {"pool": "large"}
    engine = RoleResources(role="rollout", actors=3, cpus=1.0, gpus=0.0, env={}, labels=labels)
    places = cluster.find_places([engine])
    assert len(set(places.values())) == 1
    said = []
    joined = ClusterConfig(address=ray.get_runtime_context().gcs_address, wait_s=1)
    with pytest.raises(ConfigError, match=r"no node has pool: small$"):
        cluster.require_room([replace(engine, labels={"pool": "small"})], joined, said.append)

    async with supervisor._actors(dict(places)) as spawn:
        actors = spawn(Other, engine, range(3))
        found = set(await asyncio.gather(*(actor.node.remote() for actor in actors)))
        assert found == set(places.values())

        # who replaces one of them does not go to the other node, which has room
        (another,) = spawn(Other, engine, [0])
        started = asyncio.ensure_future(another.node.remote())
        await asyncio.sleep(2.0)
        assert not started.done()
        ray.kill(actors[0])
        assert {await started} == found
