"""Config to resources: what roles ask for is compared with what there is."""

import pytest

from eopd.config import ConfigError
from eopd.runtime.placement import Capacity, RoleResources, learner_env, require_capacity, vllm_env


def role(name: str, actors: int, cpus: float, gpus: float = 0.0) -> RoleResources:
    return RoleResources(role=name, actors=actors, cpus=cpus, gpus=gpus, env={})


TWO = Capacity(cpus=2.0, gpus=0.0)


def test_fractions_that_add_up_fit():
    require_capacity([role("learner", 2, 0.25), role("rollout", 2, 0.25), role("teacher", 1, 1.0)], TWO, TWO)
    require_capacity([role("rollout", 10, 0.1)], Capacity(cpus=1.0, gpus=0.0), TWO)


def test_asking_for_too_much_names_every_role():
    with pytest.raises(ConfigError, match=r"ask for 3.5 cpus \(learner 2 x 1, rollout 3 x 0.5\); the cluster has 2"):
        require_capacity([role("learner", 2, 1.0), role("rollout", 3, 0.5)], TWO, TWO)
    with pytest.raises(ConfigError, match=r"ask for 1 gpus \(teacher 1 x 1\); the cluster has 0"):
        require_capacity([role("teacher", 1, 0.0, gpus=1.0)], TWO, TWO)


def test_an_actor_must_fit_on_one_node():
    with pytest.raises(ConfigError, match=r"learner.cpus: one actor asks for 3; the largest node has 2"):
        require_capacity([role("learner", 1, 3.0)], Capacity(cpus=8.0, gpus=0.0), TWO)


def test_threads_are_explicit():
    assert vllm_env(3)["OMP_NUM_THREADS"] == learner_env(3, gpu=True)["OMP_NUM_THREADS"] == "3"
    assert vllm_env(3)["OMP_WAIT_POLICY"] == learner_env(3, gpu=False)["OMP_WAIT_POLICY"] == "PASSIVE"
    assert "DS_ACCELERATOR" not in learner_env(1, gpu=True)
