"""Where rows go. ``Telemetry`` hands each row to every sink; a sink may fail, training may not.

run --row--> Telemetry --row--> metrics.jsonl, trackers, Console
"""

import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from eopd.run.record import Row, append_jsonl
from eopd.telemetry.series import check_row

logger = logging.getLogger(__name__)


class Telemetry:
    """Publishes metrics: hands every row to all sinks, which are functions of a row, by name. It is
    the one place that does.
    """

    def __init__(self, sinks: Mapping[str, Callable[[Row], None]]) -> None:
        self._sinks = sinks
        self._failed: set[str] = set()

    def write(self, row: Row) -> None:
        """Hand a row to every sink. A sink that fails is reported once, and tried again with the
        next row.

        Raises:
            MetricError: the row itself is wrong (see ``check_row``); no sink has seen it then.
        """
        check_row(row)
        for name, take in self._sinks.items():
            try:
                take(row)
            except Exception:
                level = logging.DEBUG if name in self._failed else logging.WARNING
                self._failed.add(name)
                logger.log(level, "%s failed: metrics may be missing there", name, exc_info=True)


def append_row(path: Path, row: Row) -> None:
    """Append one JSON object as a line: ``step``, ``time`` (seconds since 1970), then the row. A
    number that is not finite is written as null: JSON has no NaN.

    Raises:
        OSError: the file cannot be written.
    """
    numbers = {key: float(value) if math.isfinite(value) else None for key, value in row.items()}
    append_jsonl(path, {"step": int(row["eopd_step"]), "time": time.time(), **numbers})
