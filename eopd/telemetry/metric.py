"""What a metric is: the rows of the catalogue are made of it."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

Kind = Literal["gauge", "counter"]
Unit = Literal[
    "nats",
    "ratio",
    "seconds",
    "bytes",
    "tokens",
    "tokens per second",
    "FLOP per second",
    "trajectories",
    "steps",
    "versions",
    "dimensionless",
]


class MetricError(ValueError):
    """A row that the catalogue does not know: a mistake in the code that made it."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. ``healthy`` says in words what a sound run shows; ``labels`` come beside
    ``run``, which all have.
    """

    kind: Kind
    unit: Unit
    name: str
    meaning: str
    healthy: str
    labels: tuple[str, ...] = ()


nats_metric = partial(Metric, "gauge", "nats")
ratio_metric = partial(Metric, "gauge", "ratio")
seconds_metric = partial(Metric, "gauge", "seconds")
bytes_metric = partial(Metric, "gauge", "bytes")
versions_metric = partial(Metric, "gauge", "versions")
trajectories_metric = partial(Metric, "gauge", "trajectories")
number_metric = partial(Metric, "gauge", "dimensionless")
counter_metric = partial(Metric, "counter", "dimensionless")
