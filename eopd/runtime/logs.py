"""The logs of all processes of a run are collected in ``runs/<name>/logs/``.

    logs/driver.log       messages of the run on the terminal, and warnings of the driver
         rollout-0.log    every line of an actor and of the processes it owns, whatever node it is on
         learner-0.log    ...

A line is ``2026-11-24T22:54:37 rollout-0 text``, or with ``telemetry.log_format: json`` an object
with ``time``, ``role``, ``node``, ``pid`` and ``text``. A replaced actor continues the file of its
predecessor. A file that has grown to ``FULL_BYTES`` is renamed to ``rollout-0.log.1``, over the
older one: so the newest lines of a role are kept, at most ``2 * FULL_BYTES`` of them.

Ray's log monitors send all lines to the driver, within about half a second. The dispatcher that
hands them out there is Ray's own (``ray._private.ray_logging``), checked against 2.60.
"""

import json
import logging
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal

from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher

OURS: Final = "eopd_logs"
LAG_S: Final = 1.0  # until the last lines have come
FULL_BYTES: Final = 64 << 20

logger = logging.getLogger("eopd")


class RunLogs(logging.Handler):
    """A logging handler that writes the driver's records, and the lines of actors, to their files."""

    def __init__(self, directory: Path, log_format: Literal["text", "json"]) -> None:
        super().__init__()
        self._directory, self._json = directory, log_format == "json"

    def take(self, batch: Mapping[str, Any]) -> None:
        """Writes lines of one worker process, as Ray hands them out: ``lines`` by ``actor_name``, ``ip``
        and ``pid``, all of them texts. Those of Ray's own processes (``actor_name`` is empty) stay in
        Ray's logs.
        """
        if batch["actor_name"]:
            self._write(
                batch["actor_name"],
                batch["lines"],
                node=batch["ip"],
                pid=batch["pid"],
            )

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a record of the driver."""
        self._write("driver", [self.format(record)], node="driver", pid=str(record.process))

    def _write(self, role: str, lines: Sequence[str], *, node: str, pid: str) -> None:
        """Appends to the file of a role; on a disk that is full the lines are lost, not the run."""
        now = time.strftime("%Y-%m-%dT%H:%M:%S")
        # a progress bar is many lines
        pieces = (piece for line in lines for piece in re.split("[\r\n]+", line))
        lines = [piece for piece in pieces if piece.strip()]
        if self._json:
            records = [
                {"time": now, "role": role, "node": node, "pid": int(pid), "text": line}
                for line in lines
            ]
            texts = [json.dumps(record, ensure_ascii=False) for record in records]
        else:
            texts = [f"{now} {role} {line}" for line in lines]

        path = self._directory / f"{role}.log"

        try:
            with path.open("a", encoding="utf-8") as file:
                file.write("".join(f"{text}\n" for text in texts))

            if path.stat().st_size >= FULL_BYTES:
                path.replace(path.with_name(f"{path.name}.1"))
        except OSError:
            return  # the run's own files meet the same disk, and raise


def silence() -> None:
    """Keeps Ray from printing actors' lines among the driver's; to be called after ``ray.init``."""
    dispatcher.remove_handler("ray_print_logs")


@contextmanager
def collect(directory: Path, log_format: Literal["text", "json"]) -> Iterator[None]:
    """Writes the logs of all actors and of the driver while the block runs.

    Args:
        directory: where the files go; it is made where it is missing.
        log_format: the format of their lines.
    """
    directory.mkdir(exist_ok=True)
    logs = RunLogs(directory, log_format)
    logger.setLevel(logging.INFO)
    logger.addHandler(logs)
    dispatcher.add_handler(OURS, logs.take)

    try:
        yield
    finally:
        time.sleep(LAG_S)
        dispatcher.remove_handler(OURS)
        logger.removeHandler(logs)
