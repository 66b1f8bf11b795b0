"""Where rows go. ``Telemetry`` hands each row to every sink; a sink may fail, training may not.

run --row--> Telemetry --row--> JsonlSink (metrics.jsonl), PrometheusSink, trackers, Console
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from eopd.run.record import Row, append_jsonl
from eopd.telemetry.series import check_row

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """What takes rows from its construction until ``close``."""

    def write(self, row: Row) -> None:
        """Take the row of one completed step."""

    def close(self) -> None:
        """Let go of what the sink holds."""


class Telemetry:
    """Publishes metrics: a sink that hands every row to all others. It is the one place that does."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = tuple(sinks)
        self._failed: set[int] = set()

    def write(self, row: Row) -> None:
        """Hand a row to every sink. A sink that fails is reported once, and tried again with the
        next row.

        Raises:
            MetricError: the row itself is wrong (see ``check_row``); no sink has seen it then.
        """
        check_row(row)
        self._each(lambda sink: sink.write(row))

    def close(self) -> None:
        """Close every sink, also when one of them fails to."""
        self._each(lambda sink: sink.close())

    def _each(self, act: Callable[[Sink], None]) -> None:
        for index, sink in enumerate(self._sinks):
            try:
                act(sink)
            except Exception:
                level = logging.DEBUG if index in self._failed else logging.WARNING
                self._failed.add(index)
                logger.log(
                    level,
                    "%s failed: metrics may be missing there",
                    type(sink).__name__,
                    exc_info=True,
                )


class JsonlSink:
    """Writes one JSON object a line: ``step``, ``time`` (seconds since 1970), then the row.

    A number that is not finite is written as null: JSON has no NaN.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, row: Row) -> None:
        """Append one line; raises OSError where the file cannot be written."""
        numbers = {
            key: float(value) if math.isfinite(value) else None for key, value in row.items()
        }
        append_jsonl(self._path, {"step": int(row["eopd_step"]), "time": time.time(), **numbers})

    def close(self) -> None:
        """Does nothing, since nothing is held between rows."""
