"""Keys of a row: series of the catalogue's metrics, made, read and checked."""

import difflib
import re
from collections.abc import Mapping

from eopd.run.record import Row
from eopd.telemetry.catalog import CATALOG
from eopd.telemetry.metric import Metric, MetricError

_LABEL = r'\w+="[\w.@/+-]+"'
_SERIES = re.compile(rf"(?P<name>\w+)(?:\{{(?P<labels>{_LABEL}(?:,{_LABEL})*)\}})?")


def series(name: str, **labels: str) -> str:
    """Returns the row key of a metric with its labels.

    Example: ``series("eopd_staleness_ratio", versions="2")`` is
    ``'eopd_staleness_ratio{versions="2"}'``.

    Raises:
        MetricError: no such metric, or not its labels.
    """
    inner = ",".join(f'{label}="{value}"' for label, value in labels.items())
    key = f"{name}{{{inner}}}" if labels else name
    parse_series(key)
    return key


def parse_series(key: str) -> tuple[Metric, Mapping[str, str]]:
    """Returns the metric and the label values that a row key names.

    Raises:
        MetricError: no such metric, or not its labels.
    """
    match = _SERIES.fullmatch(key)
    metric = CATALOG.get(match["name"]) if match else None
    if match is None or metric is None:
        close = difflib.get_close_matches(key, CATALOG, n=1)
        hint = f"did you mean {close[0]}?" if close else "add it to eopd/telemetry/catalog.py"
        raise MetricError(f"{key}: no metric of this name; {hint}")

    labels = dict(re.findall(r'(\w+)="([^"]+)"', match["labels"] or ""))
    if set(labels) != set(metric.labels):
        raise MetricError(f"{key}: its labels must be {metric.labels}, are {tuple(labels)}")

    return metric, labels


def check_row(row: Row) -> None:
    """Raise unless a row names its step, and series of the catalogue alone.

    Raises:
        MetricError: an unknown series, or no ``eopd_step``.
    """
    for key in row:
        parse_series(key)

    if "eopd_step" not in row:
        raise MetricError(f"eopd_step: missing in a row of {sorted(row)}; every row names its step")
