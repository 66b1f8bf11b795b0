"""Metrics as values that know how they become one number over ranks and trajectories.

Whoever measures something makes a mapping of metrics, and ``reduce`` makes one row of many
mappings. So nobody who gathers metrics needs to know their names. For example

    rank 0: {"loss": Mean(6.0, 3), "memory": Max(20.0)}      loss    (6 + 1) / (3 + 1) = 1.75
    rank 1: {"loss": Mean(1.0, 1), "memory": Max(30.0)}      memory  30.0
"""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt


class Metric(ABC):
    """A part of a metric; all parts of one name are of one class."""

    @classmethod
    @abstractmethod
    def reduce(cls, parts: Sequence[Self]) -> float:
        """Returns the number that the parts make; there is at least one."""


@dataclass(frozen=True, slots=True)
class Sum(Metric):
    """A number to be added up."""

    value: float

    @classmethod
    def reduce(cls, parts: Sequence[Self]) -> float:  # noqa: D102
        return sum(part.value for part in parts)


@dataclass(frozen=True, slots=True)
class Mean(Metric):
    """A sum over ``count`` things, to become their mean over all parts; 0 where nothing counts."""

    total: float
    count: float

    @classmethod
    def reduce(cls, parts: Sequence[Self]) -> float:  # noqa: D102
        count = sum(part.count for part in parts)
        return sum(part.total for part in parts) / count if count > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Max(Metric):
    """A number of which the largest counts."""

    value: float

    @classmethod
    def reduce(cls, parts: Sequence[Self]) -> float:  # noqa: D102
        return max(part.value for part in parts)


@dataclass(frozen=True, slots=True)
class Same(Metric):
    """A number that all have alike."""

    value: float

    @classmethod
    def reduce(cls, parts: Sequence[Self]) -> float:  # noqa: D102
        return parts[0].value


@dataclass(frozen=True, slots=True)
class Quantile(Metric):
    """Numbers [N], N > 0: the share ``level`` of those of all parts is below the quantile."""

    values_N: npt.NDArray[np.floating]
    level: float

    @classmethod
    def reduce(cls, parts: Sequence[Self]) -> float:  # noqa: D102
        values = np.concatenate([part.values_N for part in parts])
        # a list, so that numpy interpolates float32 values in float64
        return float(np.quantile(values, [parts[-1].level])[0])


def reduce(mappings: Iterable[Mapping[str, Metric]]) -> dict[str, float]:
    """Returns one number for every name that occurs in any of the mappings.

    Raises:
        TypeError: parts of one name are of several classes.
    """
    parts_by_name: defaultdict[str, list[Metric]] = defaultdict(list)
    for metrics in mappings:
        for name, metric in metrics.items():
            parts_by_name[name].append(metric)

    row = {}
    for name, parts in parts_by_name.items():
        kinds = {type(part) for part in parts}
        if len(kinds) > 1:
            raise TypeError(f"{name}: its parts are {sorted(kind.__name__ for kind in kinds)}")

        row[name] = kinds.pop().reduce(parts)

    return row
