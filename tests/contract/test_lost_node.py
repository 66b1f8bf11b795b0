"""A node is lost with the trajectories it holds: these are sampled again, and nobody else is
lost.
"""

import sys

import fakes
import numpy as np
import pytest
import ray
from ray import cloudpickle
from ray.cluster_utils import Cluster

from eopd.config import load_config
from eopd.packing import pack_batch
from eopd.roles import BodiesLostError
from eopd.runtime.actors import RemoteTeacher
from eopd.runtime.gang import LearnerGang
from eopd.runtime.learner_actor import LearnerActor
from eopd.types import LostReason, LostTrajectory, Stored

# workers do not find the tests' modules
cloudpickle.register_pickle_by_value(sys.modules[__name__])

HEADER = fakes.header(sample_index=1)


class Actor:
    def make(self):
        return np.zeros(1 << 20)

    def score(self, header, body):
        return header, body


@pytest.fixture
def cluster():
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    try:
        far = cluster.add_node(num_cpus=1, resources={"far": 1})
        ray.init(address=cluster.address, log_to_driver=False)
        yield cluster, far
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.timeout(240)
async def test_trajectories_of_a_lost_node(cluster, tmp_path):
    cluster, far = cluster
    config = load_config(fakes.write_config(tmp_path))
    gang = LearnerGang(pytest.fail, config)
    actor = ray.remote(Actor)
    here = {"node:__internal_head__": 0.01}
    writer = actor.options(resources={"far": 1}).remote()
    reader = actor.options(resources=here).remote()
    bodies = [writer.make.remote() for _ in range(2)]
    ray.wait(bodies, num_returns=2, fetch_local=False)
    cluster.remove_node(far, allow_graceful=False)
    lost = await RemoteTeacher(reader).score(Stored(HEADER, bodies[0]))
    assert isinstance(lost, LostTrajectory)
    assert (lost.key, lost.reason) == (
        HEADER.key,
        LostReason.BODY_LOST,
    )
    assert lost.detail.startswith("its body was lost")

    gang._actors = [
        ray.remote(LearnerActor).options(num_cpus=0, resources=here).remote("rank")
        for _ in range(2)
    ]
    kept = [reader.make.remote() for _ in range(3)]
    stored = [
        Stored(fakes.header(str(number)), body)
        for number, body in enumerate([kept[0], bodies[1], *kept[1:]])
    ]
    batch = pack_batch(stored, steps=1, ranks=2, token_budget=100, alpha=1.0)
    with pytest.raises(BodiesLostError) as lost_bodies:
        await gang._hand_over(batch)

    assert lost_bodies.value.keys == {stored[1].header.key}
    del stored[1]
    await gang._hand_over(
        pack_batch(
            stored,
            steps=1,
            ranks=2,
            token_budget=100,
            alpha=1.0,
        )
    )
