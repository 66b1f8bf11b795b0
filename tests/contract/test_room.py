"""A run waits for room in a real cluster: until others have ended."""

import sys
import threading

import pytest
import ray
from ray import cloudpickle

from eopd.config import ConfigError
from eopd.runtime import cluster
from eopd.runtime.placement import RoleResources

# workers do not find the tests' modules
cloudpickle.register_pickle_by_value(sys.modules[__name__])

ROLES = [
    RoleResources(role="learner", actors=2, cpus=0.5, gpus=0.0, env={}),
    RoleResources(role="teacher served", actors=1, cpus=0.0, gpus=0.0, env={}),
    RoleResources(role="rollout", actors=1, cpus=1.0, gpus=0.0, env={}),
]


class Other:
    def ping(self):
        pass


@pytest.fixture
def other(monkeypatch):
    """A cluster of two CPUs, and an actor of somebody else that holds one of them."""
    monkeypatch.setattr(cluster, "SETTLE_S", 0.5)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        actor = ray.remote(num_cpus=1)(Other).remote()
        ray.get(actor.ping.remote())
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
