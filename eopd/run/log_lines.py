"""Reads the files of ``logs/`` as one: the lines of all roles in the order of their times.

Every line begins with its time, or is a JSON object that has it (``runtime/logs.py``). A file that
is full becomes ``<role>.log.1``.
"""

import heapq
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from eopd.config import ConfigError
from eopd.run.reading import parse_object

_TIME: Final = len("2026-11-24T22:54:37")


def files_of(logs: Path, role: str | None) -> list[Path]:
    """Returns the files of a role, such as ``rollout-0``, or ``rollout`` for all engines; without
    one those of all roles.

    Raises:
        ConfigError: there are none; names the roles that there are.
    """
    files = {path.stem: path for path in sorted(logs.glob("*.log"))}
    if not files:
        raise ConfigError(f"{logs} holds no logs; the run has not started its workers")

    chosen = [
        path
        for name, path in files.items()
        if role is None or name == role or name.startswith(f"{role}-")
    ]
    if not chosen:
        raise ConfigError(f"--role {role}: there are logs of {', '.join(files)}")

    return chosen


class Log:
    """One file, read to its end and then what is added to it, also when another takes its place."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._older = path.with_name(f"{path.name}.1")
        self._inode, self._offset = 0, 0

    def last(self, count: int) -> list[str]:
        """Returns the last lines; reading goes on behind them."""
        lines = deque(self.added(), maxlen=count)
        if len(lines) < count and self._older.exists():
            with self._older.open("rb") as file:
                before = deque(file, maxlen=count - len(lines))

            lines.extendleft(_text(line) for line in reversed(before))

        return list(lines)

    def added(self) -> Iterator[str]:
        """Yields the whole lines that were added since."""
        if self._inode and self._is_at(self._older):
            yield from self._rest(self._older)

        if not self._path.exists():
            return

        if not self._is_at(self._path):
            self._inode, self._offset = self._path.stat().st_ino, 0

        yield from self._rest(self._path)

    def _is_at(self, path: Path) -> bool:
        """Tells whether a path names the file that is being read."""
        return path.exists() and path.stat().st_ino == self._inode

    def _rest(self, path: Path) -> Iterator[str]:
        with path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):  # it is being written
                    return

                self._offset += len(line)
                yield _text(line)


def merged(parts: Sequence[Sequence[str]]) -> list[str]:
    """Returns the lines of several files in the order of their times."""
    return list(heapq.merge(*parts, key=_time_of))


def _text(line: bytes) -> str:
    return line.decode(errors="replace").rstrip("\n")


def _time_of(line: str) -> str:
    if line.startswith("{"):
        return str(parse_object(line).get("time", ""))

    return line[:_TIME]
