"""What every process of a run says, in one place: ``runs/<name>/logs/``.

    logs/driver.log       what the run says on the terminal, and warnings of the driver
         rollout-0.log    every line of an actor and of the processes it owns, whatever node it is on
         learner-0.log    ...

A line is ``2026-11-24T22:54:37 rollout-0 text``, or with ``telemetry.log_format: json`` an object
with ``time``, ``role``, ``node``, ``pid`` and ``text``. A replaced actor goes on in the file of the
one before it. A file that has grown to ``FULL_BYTES`` becomes ``rollout-0.log.1``, in place of the
one before it: a role's newest lines are kept, and at most twice as many bytes.

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
from typing import Final, Literal, TypedDict

from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher

OURS: Final = "eopd_logs"
LAG_S: Final = 1.0  # until the last lines have come
FULL_BYTES: Final = 64 << 20

logger = logging.getLogger("eopd")


class Batch(TypedDict):
    """Lines of one worker process, as Ray hands them out."""

    ip: str
    pid: str
    actor_name: str
    lines: Sequence[str]


class RunLogs(logging.Handler):
    """Writes the files; takes the driver's own records as a logging handler."""

    def __init__(self, directory: Path, log_format: Literal["text", "json"]) -> None:
        super().__init__()
        self._directory, self._json = directory, log_format == "json"

    def take(self, batch: Mapping[str, object]) -> None:
        """Lines from Ray; those of its own processes (``actor_name`` is empty) stay in Ray's
        logs.
        """
        lines: Batch = batch  # type: ignore[assignment]
        if lines["actor_name"]:
            self._write(lines["actor_name"], lines["lines"], node=lines["ip"], pid=lines["pid"])

    def emit(self, record: logging.LogRecord) -> None:
        """A record of the driver."""
        self._write("driver", [self.format(record)], node="driver", pid=str(record.process))

    def _write(self, role: str, lines: Sequence[str], *, node: str, pid: str) -> None:
        """Append; a disk that does not take it costs these lines, never the run."""
        now = time.strftime("%Y-%m-%dT%H:%M:%S")
        # a progress bar is many lines
        parts = (part for line in lines for part in re.split("[\r\n]+", line))
        lines = [part for part in parts if part.strip()]
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
            return  # the run's own files meet the same disk, and say so


def silence() -> None:
    """Keep Ray from printing actors' lines among the driver's; to be called once it is
    initialised.
    """
    dispatcher.remove_handler("ray_print_logs")


@contextmanager
def collect(directory: Path, log_format: Literal["text", "json"]) -> Iterator[None]:
    """Write the logs of all actors, and the driver's, while the block runs.

    Args:
        directory: made where it is missing.
        log_format: of the lines.
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
