"""Groups runs into arms, and compares the arms over their seeds. Pure functions, without files.

    configs ─ group_runs ─▶ arms ─ by_seed ─▶ values of a metric ─ interval, paired ─▶ intervals

An arm is the runs of one setting: their configs differ only in the seed, and in names and places
that change nothing that is computed. The first arm is that of the first config; the others are
compared with it.

    arms = group_runs(configs)  # flat configs, of config.load.flatten
    first, *others = [by_seed(arm, values) for arm in arms]  # values: one for each config
    interval(first.values()), [paired(first, other) for other in others]
"""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Final

from eopd.config.words import short

CONFIDENCE: Final = 0.95
SEED: Final = "run.seed"

# Keys, and beginnings of keys, that do not tell arms apart.
PLACES: Final = (
    SEED,
    "run.name",
    "run.directory",
    "run.upload",
    "run.expected_minutes",
    "student.dtype_reason",
    "learner.zero_stage_reason",
    "cluster",
    "telemetry",
)

FlatConfig = Mapping[str, object]  # the leaves of a config by dotted key


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """An arm is the runs of one setting.

    Args:
        settings: the keys that tell the arms of a group apart, with this arm's values; a key that
            its config lacks is left out, and with one arm there are none.
        runs: the places of its runs in the sequence that was grouped.
        seeds: the seed of each of these runs.
    """

    settings: FlatConfig
    runs: Sequence[int]
    seeds: Sequence[int]

    @property
    def label(self) -> str:
        """Returns the settings in one line, as in ``loss.gate.kind=hard, learner.lr=1e-05``."""
        return ", ".join(f"{key}={short(value)}" for key, value in self.settings.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean over ``count`` values and its confidence interval; ``low`` and ``high`` are None where
    one value shows no spread.
    """

    count: int
    mean: float
    low: float | None
    high: float | None


def group_runs(configs: Sequence[FlatConfig]) -> list[Arm]:
    """Returns the arms of some runs, in the order in which the first run of each stands."""
    members: dict[tuple[object, ...], list[int]] = {}
    keys = [key for key in dict.fromkeys(chain(*configs)) if not is_place(key)]
    for index, config in enumerate(configs):
        # repr: a list is no key of a dict, and 1 is not true
        setting = tuple(repr(config[key]) if key in config else None for key in keys)
        members.setdefault(setting, []).append(index)

    varied = [key for key, *values in zip(keys, *members, strict=True) if len(set(values)) > 1]
    return [_arm(configs, runs, varied) for runs in members.values()]


def is_place(key: str) -> bool:
    """Tells whether a key does not tell arms apart."""
    is_reason = key.startswith("teachers.") and key.endswith(".dtype_reason")
    return is_reason or any(key == place or key.startswith(f"{place}.") for place in PLACES)


def by_seed(arm: Arm, values: Sequence[float | None]) -> dict[int, float]:
    """Returns an arm's values of a metric by seed, with the mean where a seed was run twice.

    Args:
        arm: one of the arms of ``group_runs``.
        values: the metric of every run that was grouped; None where a run has none.
    """
    found: dict[int, list[float]] = {}
    for run, seed in zip(arm.runs, arm.seeds, strict=True):
        if (value := values[run]) is not None:
            found.setdefault(seed, []).append(value)

    return {seed: statistics.fmean(several) for seed, several in found.items()}


def interval(values: Iterable[float]) -> Interval | None:
    """Returns the mean of independent values, and the interval of Student's t that holds the true
    mean with probability ``CONFIDENCE``; None without any value.
    """
    numbers = list(values)
    if not numbers:
        return None

    mean = statistics.fmean(numbers)
    if len(numbers) == 1:
        return Interval(count=1, mean=mean, low=None, high=None)

    standard_error = statistics.stdev(numbers) / math.sqrt(len(numbers))
    half = t_quantile(len(numbers) - 1) * standard_error
    return Interval(count=len(numbers), mean=mean, low=mean - half, high=mean + half)


def paired(first: Mapping[int, float], other: Mapping[int, float]) -> Interval | None:
    """Returns the interval of ``other - first`` over the seeds that both have; None without any."""
    return interval(other[seed] - first[seed] for seed in first if seed in other)


def t_quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """Returns the t between whose negative and itself Student's distribution has a share
    ``confidence``: 12.706 for one degree of freedom, 2.776 for four.
    """
    low, high = 0.0, math.pi / 2
    share = _share_within(degrees)
    while low < (angle := (low + high) / 2) < high:
        if share(angle) < confidence:
            low = angle
        else:
            high = angle

    return math.sqrt(degrees) * math.tan(high)


def _share_within(degrees: int) -> Callable[[float], float]:
    """Returns the share of Student's distribution between -t and t, as a function of the angle
    ``atan(t / sqrt(degrees))``. It is a finite sum for whole degrees of freedom (Abramowitz and
    Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4).
    """

    def share(angle: float) -> float:
        odd = degrees % 2
        term = math.cos(angle) if odd else 1.0
        total = 0.0
        for factor in range(2 + odd, degrees + 1, 2):
            total += term
            term *= (factor - 1) / factor * math.cos(angle) ** 2

        total *= math.sin(angle)
        return 2 / math.pi * (angle + total) if odd else total

    return share


def _arm(configs: Sequence[FlatConfig], runs: Sequence[int], varied: Sequence[str]) -> Arm:
    config = configs[runs[0]]
    seeds = [_seed_of(configs[run]) for run in runs]
    settings = {key: config[key] for key in varied if key in config}
    return Arm(settings=settings, runs=tuple(runs), seeds=tuple(seeds))


def _seed_of(config: FlatConfig) -> int:
    seed = config.get(SEED)
    return seed if isinstance(seed, int) else 0
