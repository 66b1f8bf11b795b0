"""A real cluster: a run waits for room until others have ended, and its actors get their nodes."""

import asyncio
import sys
import threading

import pytest
import ray
from ray import cloudpickle
from ray.cluster_utils import Cluster

from eopd.config import ConfigError
from eopd.runtime import cluster, supervisor
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
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        actor = ray.remote(num_cpus=1)(Other).remote()
        ray.get(actor.node.remote())
        yield actor
    finally:
        ray.shutdown()


@pytest.mark.timeout(120)
def test_room_that_others_give_back_is_waited_for_and_stays_free(other):
    said = []
    with pytest.raises(ConfigError, match=r"1 of 2 are free \(1 are held by others\)$"):
        cluster.require_room(ROLES, 1.0, said.append)

    ends = threading.Timer(3.0, ray.kill, [other])
    ends.start()
    cluster.require_room(ROLES, 60.0, said.append)
    assert ends.finished.is_set()
    assert [line.split(" s (")[0] for line in said] == [
        f"waiting for room, for up to {seconds}" for seconds in (1, 60)
    ]
    cluster.require_room(ROLES)


@pytest.fixture
def two_nodes():
    """A head of one CPU, and a node of three; the id of the latter."""
    nodes = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    try:
        large = nodes.add_node(num_cpus=3)
        ray.init(address=nodes.address, log_to_driver=False)
        yield large.node_id
    finally:
        ray.shutdown()
        nodes.shutdown()


@pytest.mark.timeout(120)
async def test_actors_start_on_their_nodes_and_are_replaced_wherever_there_is_room(two_nodes):
    learner = RoleResources(role="learner", actors=2, cpus=1.0, gpus=0.0, env={})
    engine = RoleResources(role="rollout", actors=1, cpus=1.0, gpus=0.0, env={})
    async with supervisor._actors(cluster.find_places([engine, learner])) as spawn:
        ranks = spawn(Other, learner, range(2))
        assert await asyncio.gather(*(rank.node.remote() for rank in ranks)) == [two_nodes] * 2
        (first,) = spawn(Other, engine, [0])
        assert await first.node.remote() != two_nodes

        (waiting,) = spawn(Other, engine, [0])
        assert await waiting.node.remote() == two_nodes
