"""Config to resources and environment, pure: what each actor asks of Ray, and what its processes see.

Thread counts are set explicitly: Ray's CPU numbers are admission, not affinity, and may be fractional.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from eopd.config import Config, ConfigError, LearnerConfig, RolloutConfig, TeacherConfig

# What every process of ours sees: no phone-home, no hub look-ups at start, quiet libraries. Threads of OpenMP that wait
# for each other sleep: where roles share cores, one that spins keeps off the one it waits for, which took half of all
# tokens/s (tests/bench/bench_overlap.py).
COMMON_ENV: Mapping[str, str] = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """CPUs and GPUs of a cluster or a node."""

    cpus: float
    gpus: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleResources:
    """What one actor of a role asks for."""

    role: str
    actors: int
    cpus: float
    gpus: float
    env: Mapping[str, str]


def vllm_env(threads: int) -> dict[str, str]:
    """Environment of an actor that hosts a vLLM engine; its engine and worker processes inherit it (vLLM 0.32.0)."""
    return dict(COMMON_ENV) | {
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several engines share a machine
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_PLUGINS": "eopd",
    }


def learner_env(threads: int, *, gpu: bool) -> dict[str, str]:
    """Environment of a learner rank."""
    env = dict(COMMON_ENV) | {"OMP_NUM_THREADS": str(threads), "LOCAL_RANK": "0"}
    return env if gpu else env | {"DS_ACCELERATOR": "cpu"}


def plan(config: Config) -> tuple[RoleResources, ...]:
    """What a training run asks for: learner, rollout, and every teacher."""
    return (plan_learner(config.learner), plan_rollout(config.rollout), *map(plan_teacher, config.teachers))


def plan_learner(learner: LearnerConfig) -> RoleResources:
    """What the learner ranks ask for."""
    env = learner_env(learner.threads, gpu=learner.gpus > 0)
    return RoleResources(role="learner", actors=learner.ranks, cpus=learner.cpus, gpus=learner.gpus, env=env)


def plan_teacher(teacher: TeacherConfig) -> RoleResources:
    """What a teacher's replicas ask for; each of a served one is a client."""
    return RoleResources(
        role=f"teacher {teacher.name}",
        actors=teacher.replicas,
        cpus=teacher.cpus,
        gpus=teacher.gpus,
        env=vllm_env(teacher.threads),
    )


def plan_rollout(rollout: RolloutConfig) -> RoleResources:
    """What the rollout engines ask for."""
    env = vllm_env(rollout.threads)
    return RoleResources(role="rollout", actors=rollout.engines, cpus=rollout.cpus, gpus=rollout.gpus, env=env)


def require_capacity(roles: Sequence[RoleResources], total: Capacity, largest_node: Capacity) -> None:
    """Compare the sum of all roles with the cluster, and each actor with its largest node.

    Raises:
        ConfigError: together they ask for more than there is, or one for more than any node has.
    """
    for resource in ("cpus", "gpus"):
        asked = sum(role.actors * getattr(role, resource) for role in roles)
        available, on_a_node = getattr(total, resource), getattr(largest_node, resource)
        if asked > available + 1e-6:
            parts = ", ".join(f"{r.role} {r.actors} x {getattr(r, resource):g}" for r in roles)
            raise ConfigError(f"the roles ask for {asked:g} {resource} ({parts}); the cluster has {available:g}")
        for role in roles:
            if getattr(role, resource) > on_a_node:
                wanted = f"{role.role}.{resource}: one actor asks for {getattr(role, resource):g}"
                raise ConfigError(f"{wanted}; the largest node has {on_a_node:g}")
