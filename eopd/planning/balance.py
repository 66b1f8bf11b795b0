"""How many engines, replicas and ranks balance each other, by rates that were measured.

With n_i workers of a stage, each doing r_i response tokens a second on d_i devices, stages that
overlap do X = min(n_i r_i) together. For N devices the best X is the largest with

    sum of ceil(X / r_i) d_i <= N

which is at most N / sum(d_i / r_i). It lies at some n_i r_i, so those are tried.

Assumed: a stage of n workers is n times as fast as one; rates do not depend on how many there are;
stages overlap (``flow.max_staleness`` of 1 or more); a publish costs nothing. Where stages cannot
overlap a step takes up to the sum of their seconds.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from eopd.config import Config, ConfigError

Counts = dict[str, int]
WORKERS = {"generate": "engines", "score": "replicas", "train": "ranks"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A stage does ``rate`` response tokens a second with one worker, on ``devices`` devices."""

    name: str
    rate: float
    devices: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """Workers of each stage, and what they do together. ``spare`` devices would not make it faster.

    ``next_bottleneck`` is where the bottleneck is with one worker more of the present one, at
    ``next_tokens_per_s``. ``in_turn_steps`` are the steps an hour where no two stages overlap.
    """

    counts: Counts
    devices: int
    spare: int
    tokens_per_s: float
    steps_per_hour: float
    in_turn_steps: float
    bottleneck: str
    next_bottleneck: str
    next_tokens_per_s: float


def stages_of(config: Config, rates: Mapping[str, float]) -> tuple[Stage, ...]:
    """Returns the stages of a run; teachers behind servers use none of its devices, and are left out.

    A worker without GPUs counts as one device, and so does one with a share of a GPU.
    """
    local = [teacher for teacher in config.teachers if teacher.backend == "vllm"]
    devices = {"generate": config.rollout.gpus, "train": config.learner.gpus}
    if local:
        devices["score"] = max(teacher.gpus for teacher in local)

    return tuple(
        Stage(name=name, rate=rates[name], devices=max(1, math.ceil(devices[name])))
        for name in WORKERS
        if name in devices
    )


def counts_of(config: Config) -> Counts:
    """Returns the workers that the config has; replicas are those of all teachers in the cluster."""
    replicas = sum(teacher.replicas for teacher in config.teachers if teacher.backend == "vllm")
    counts = {
        "generate": config.rollout.engines,
        "score": replicas,
        "train": config.learner.ranks,
    }
    return {name: count for name, count in counts.items() if count}


def batch_of(config: Config, devices: int, fewest: int) -> int:
    """Returns the trajectories of a batch on so many devices, if the config's is for the fewest."""
    return config.batch_trajectories * devices // fewest


def best_counts(stages: tuple[Stage, ...], devices: int, option: str = "--devices") -> Counts:
    """Returns the workers of each stage that do most on so many devices; of equals the fewest.

    Raises:
        ConfigError: the devices, which ``option`` names, do not hold one worker of each stage.
    """
    least = sum(stage.devices for stage in stages)
    if devices < least:
        needed = ", ".join(f"{stage.name} {stage.devices}" for stage in stages)
        raise ConfigError(
            f"{option} {devices}: one worker of each stage needs {least} devices ({needed})"
        )

    best = {stage.name: 1 for stage in stages}
    for stage in stages:
        for count in range(1, devices // stage.devices + 1):
            target = count * stage.rate
            counts = {one.name: math.ceil(target / one.rate - 1e-9) for one in stages}
            counts = {name: max(1, number) for name, number in counts.items()}
            if devices_of(stages, counts) <= devices and _rate(stages, counts) > _rate(
                stages, best
            ):
                best = counts

    return best


def balance(
    stages: tuple[Stage, ...], counts: Counts, *, devices: int, batch_tokens: float
) -> Balance:
    """Returns what so many workers do together; ``batch_tokens`` are the response tokens of a step."""
    rates = {stage.name: counts[stage.name] * stage.rate for stage in stages}
    rate, bottleneck = min((rate, name) for name, rate in rates.items())
    one_more = counts | {bottleneck: counts[bottleneck] + 1}
    following = {stage.name: one_more[stage.name] * stage.rate for stage in stages}
    next_rate, next_bottleneck = min((rate, name) for name, rate in following.items())
    in_turn_s = sum(batch_tokens / each for each in rates.values())

    return Balance(
        counts=counts,
        devices=devices,
        spare=devices - devices_of(stages, counts),
        tokens_per_s=rate,
        steps_per_hour=3600.0 * rate / batch_tokens,
        in_turn_steps=3600.0 / in_turn_s,
        bottleneck=bottleneck,
        next_bottleneck=next_bottleneck,
        next_tokens_per_s=next_rate,
    )


def devices_of(stages: tuple[Stage, ...], counts: Counts) -> int:
    """Returns the devices that so many workers use."""
    return sum(counts[stage.name] * stage.devices for stage in stages)


def _rate(stages: tuple[Stage, ...], counts: Counts) -> float:
    return min(counts[stage.name] * stage.rate for stage in stages)
