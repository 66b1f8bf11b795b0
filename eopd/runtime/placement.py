"""A config decides what each actor asks of Ray, and the environment of its processes. Pure functions.

Thread counts are set explicitly: Ray's CPU numbers are admission, not affinity, and may be
fractional. Threads that wait always sleep: spinning would pay only where roles take turns, but a
teacher scores while engines write and a step begins before its batch is whole, and under
``OMP_WAIT_POLICY=ACTIVE`` a role without work keeps its cores busy too (torch 2.13: 1.5 s of CPU in
1.5 s of sleep).
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from eopd.config import Config, ConfigError, LearnerConfig, RolloutConfig, TeacherConfig

# The environment of every process: no telemetry of libraries, no progress bars, few messages.
# Threads of OpenMP sleep while they wait for each other: where roles share cores, a thread that
# spins keeps the one it waits for off its core, which cost half of all tokens/s
# (tests/bench/bench_overlap.py).
COMMON_ENV: Mapping[str, str] = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}


# An actor that asks Ray for no GPU would see all of them (Ray 2.60, ``set_visible_accelerator_ids``),
# and take one that Ray has given to another.
NO_GPU: Mapping[str, str] = {"CUDA_VISIBLE_DEVICES": ""}

# Compiles nothing. vLLM 0.32.0 would compile what gives a sampled token its rank also in an eager
# engine, which stands still for 5 s, twice, and the kernel that it gets on a CPU takes 9 ms where
# torch takes 1 (16 rows of 49,152). DeepSpeed 0.19.8 imports an optimiser that nobody asked for, whose
# decorator loads the compiler: a second of each rank's start.
EAGER: Mapping[str, str] = {"TORCHDYNAMO_DISABLE": "1"}
ROUNDING = 1e-6  # the error of sums of fractions
LEARNER = "learner"

Places = dict[tuple[str, int], str]  # the ids of the nodes of actors, by role and number


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """A capacity is a number of CPUs and of GPUs."""

    cpus: float
    gpus: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A node is a machine of the cluster: what it has in total, what is free now, and Ray's id and
    labels of it.
    """

    total: Capacity
    free: Capacity
    id: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleResources:
    """The number of actors of a role, and what each of them asks for, also of its node."""

    role: str
    actors: int
    cpus: float
    gpus: float
    env: Mapping[str, str]
    labels: Mapping[str, str] = field(default_factory=dict)


class _Room:
    """What is left of a node while actors are given places: CPUs, and a share of each GPU.

    Ray takes a share from one GPU, the fullest that has it, and more than a share from GPUs that are
    whole (2.60, ``NodeResourceInstanceSet``). How shares that others hold lie on the GPUs is not
    known: they are counted as if they lay on as few as can be.
    """

    def __init__(self, free: Capacity) -> None:
        whole, share = divmod(free.gpus + ROUNDING, 1.0)
        self.cpus = free.cpus
        self.gpus = sorted([*[1.0] * int(whole), share])

    @property
    def size(self) -> tuple[float, float]:
        """Returns the GPUs and the CPUs."""
        return sum(self.gpus), self.cpus

    def num_held(self, role: RoleResources) -> float:
        """Returns how many of a role's actors find room, at most all of them."""
        counts = [float(role.actors)]
        if role.cpus:
            counts.append((self.cpus + ROUNDING) // role.cpus)

        if 0 < role.gpus < 1:
            counts.append(sum((share + ROUNDING) // role.gpus for share in self.gpus))
        elif role.gpus:
            counts.append(sum(share + ROUNDING >= 1 for share in self.gpus) // role.gpus)

        return min(counts)

    def give(self, role: RoleResources) -> None:
        """Takes away what an actor asks for, which is there."""
        self.cpus -= role.cpus
        asked = min(role.gpus, 1.0)
        for _ in range(math.ceil(role.gpus)):
            index = next(i for i, share in enumerate(self.gpus) if share + ROUNDING >= asked)
            self.gpus[index] -= asked

        self.gpus.sort()


def vllm_env(threads: int) -> dict[str, str]:
    """Returns the environment of an actor that hosts a vLLM engine; its engine and worker processes
    inherit it (vLLM 0.32.0).
    """
    return dict(COMMON_ENV) | {
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several engines share a machine
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_PLUGINS": "eopd",
    }


def learner_env(threads: int, *, gpu: bool) -> dict[str, str]:
    """Returns the environment of a learner rank."""
    env = dict(COMMON_ENV) | {"OMP_NUM_THREADS": str(threads), "LOCAL_RANK": "0"}
    return env if gpu else env | {"DS_ACCELERATOR": "cpu", **EAGER}


def plan(config: Config) -> tuple[RoleResources, ...]:
    """Returns what a training run asks for: learner, rollout, and every teacher."""
    return (
        plan_learner(config.learner),
        plan_rollout(config.rollout),
        *map(plan_teacher, config.teachers),
    )


def plan_learner(learner: LearnerConfig) -> RoleResources:
    """Returns what the learner ranks ask for."""
    env = learner_env(learner.threads, gpu=learner.gpus > 0)
    return _resources(LEARNER, learner.ranks, learner, env)


def plan_teacher(teacher: TeacherConfig) -> RoleResources:
    """Returns what a teacher's replicas ask for. A replica of a served teacher is a client."""
    env = vllm_env(teacher.threads)
    return _resources(f"teacher {teacher.name}", teacher.replicas, teacher, env)


def plan_rollout(rollout: RolloutConfig) -> RoleResources:
    """Returns what the rollout engines ask for."""
    env = vllm_env(rollout.threads)
    if rollout.gpus == 0 and rollout.vllm.get("enforce_eager", True):
        env |= EAGER

    return _resources("rollout", rollout.engines, rollout, env)


def _resources(
    role: str,
    actors: int,
    section: LearnerConfig | TeacherConfig | RolloutConfig,
    env: Mapping[str, str],
) -> RoleResources:
    """Returns what the actors of a section ask for. Those that ask for no GPU see none."""
    return RoleResources(
        role=role,
        actors=actors,
        cpus=section.cpus,
        gpus=section.gpus,
        env=env if section.gpus else {**env, **NO_GPU},
        labels=section.node_labels,
    )


def shares_gpus(config: Config) -> bool:
    """Tells whether some role asks for a share of a GPU, so that another one may have the rest."""
    return any(0 < role.gpus < 1 for role in plan(config))


def require_capacity(roles: Sequence[RoleResources], nodes: Sequence[Node]) -> None:
    """Compares what all roles ask for with what the cluster has and what is free, and each actor with
    single nodes.

    Raises:
        ConfigError: together they ask for more than there is or than is free, an actor for more
            than any node has or has free, or what is free is scattered over too many nodes.
    """
    for resource in ("cpus", "gpus"):
        total = [getattr(node.total, resource) for node in nodes]
        free = [getattr(node.free, resource) for node in nodes]
        _require_sum(roles, resource, sum(total), sum(free))

        for role in roles:
            _require_node(role, resource, nodes)

    choose_nodes(roles, nodes)


def _require_node(role: RoleResources, resource: str, nodes: Sequence[Node]) -> None:
    suited = [node for node in nodes if _suits(role, node)]
    labels = ", ".join(f"{name}: {value}" for name, value in role.labels.items())
    if not suited:
        raise ConfigError(f"{_key(role)}.node_labels: no node has {labels}")

    number = getattr(role, resource)
    total = max(getattr(node.total, resource) for node in suited)
    free = max(getattr(node.free, resource) for node in suited)
    request = f"{_key(role)}.{resource}: one actor asks for {number:g}"
    those = f" with {labels}" if labels else ""
    if number > total + ROUNDING:
        raise ConfigError(f"{request}; the largest node{those} has {total:g}")

    if number > free + ROUNDING:
        raise ConfigError(f"{request}; no node{those} has more than {free:g} free")


def lack_of(roles: Sequence[RoleResources], nodes: Sequence[Node]) -> str | None:
    """Returns what ``require_capacity`` says that roles lack on some nodes; None where it is nothing."""
    try:
        require_capacity(roles, nodes)
    except ConfigError as error:
        return str(error)

    return None


def room_here(config: Config, *, cpus: float, gpus: float) -> str | None:
    """Returns what a run lacks where Ray is started on a machine of so many CPUs and GPUs, or None."""
    here = Capacity(cpus=config.cluster.cpus or cpus, gpus=gpus)
    return lack_of(plan(config), [Node(total=here, free=here)])


def summarize(config: Config) -> str:
    """Returns what the roles of a run ask of Ray, as a line."""
    roles = plan(config)
    return "; ".join(_asked(roles, resource)[1] for resource in ("cpus", "gpus"))


def _asked(roles: Sequence[RoleResources], resource: str) -> tuple[float, str]:
    """Returns what all roles together ask for of a resource, as a number and in words."""
    asked = sum(role.actors * getattr(role, resource) for role in roles)
    parts = ", ".join(f"{role.role} {role.actors} x {getattr(role, resource):g}" for role in roles)
    return asked, f"the roles ask for {asked:.9g} {resource} ({parts})"


def _require_sum(roles: Sequence[RoleResources], resource: str, total: float, free: float) -> None:
    asked, all_roles = _asked(roles, resource)
    if asked > total + ROUNDING:
        raise ConfigError(f"{all_roles}; the cluster has {total:g}")

    if asked > free + ROUNDING:
        raise ConfigError(
            f"{all_roles}; {free:g} of {total:g} are free ({total - free:g} are held by others)"
        )


def choose_nodes(
    roles: Sequence[RoleResources], nodes: Sequence[Node], *, spread: bool = False
) -> Places:
    """Gives every actor a node that has room for it.

    Ray gives one actor after the other the node that suits it best, so that a large engine may find
    no node any more, and learner ranks lie apart. Here the learner's ranks come first, on as few
    nodes as can be, then actors that may not go everywhere, and then the largest; or all of them in
    the order of the latter, where only that works.

    Args:
        roles: what is to be placed.
        nodes: where.
        spread: whether others than the learner go to the nodes with the most room left, if all
            find room so.

    Raises:
        ConfigError: a node is missing for one of them.
    """
    by_size = sorted(
        roles, key=lambda role: (bool(role.labels), role.gpus, role.cpus), reverse=True
    )
    learner_first = sorted(by_size, key=lambda role: role.role != LEARNER)
    if spread:
        with suppress(ConfigError):
            return _fill(learner_first, nodes, together=True, spread=True)

    try:
        return _fill(learner_first, nodes, together=True)
    except ConfigError:
        return _fill(by_size, nodes, together=False)


def _fill(
    roles: Sequence[RoleResources], nodes: Sequence[Node], *, together: bool, spread: bool = False
) -> Places:
    """Gives the actors of one role after the other the smallest node that has room, or with ``spread``
    the one that has the most left; where the learner's ranks are to lie ``together``, they go first
    to the nodes that hold the most of them.
    """
    smallest = sorted(nodes, key=lambda node: (node.free.gpus, node.free.cpus))
    rooms = [_Room(node.free) for node in smallest]
    places: Places = {}
    for role in roles:
        order = list(range(len(nodes)))
        if together and role.role == LEARNER:
            order.sort(key=lambda index: -rooms[index].num_held(role))

        for number in range(role.actors):
            fitting = [
                index
                for index in order
                if _suits(role, smallest[index]) and rooms[index].num_held(role)
            ]
            if not fitting:
                raise ConfigError(_no_place(role, nodes))

            index = fitting[0]
            if spread and role.role != LEARNER:
                index = max(fitting, key=lambda one: rooms[one].size)

            rooms[index].give(role)
            places[role.role, number] = smallest[index].id

    return places


def _no_place(role: RoleResources, nodes: Sequence[Node]) -> str:
    suited = [node.free for node in nodes if _suits(role, node)]
    free = ", ".join(f"{one.cpus:g} cpus and {one.gpus:g} gpus" for one in suited)
    shares = "; a share comes from one GPU" if 0 < role.gpus < 1 else ""
    return (
        f"{_key(role)}: {role.actors} x {role.cpus:g} cpus and {role.gpus:g} gpus find no room "
        f"beside the other roles; free on single nodes are {free}{shares}"
    )


def _suits(role: RoleResources, node: Node) -> bool:
    return all(node.labels.get(name) == value for name, value in role.labels.items())


def _key(role: RoleResources) -> str:
    """Returns the key of the role in the config."""
    return role.role.replace("teacher ", "teachers.", 1)
