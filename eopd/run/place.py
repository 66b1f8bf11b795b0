"""The directory of a run is checked before the run begins: it can be written, and holds no files of
another program.
"""

import json
import math
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Final

from eopd.config import ConfigError, load_config
from eopd.run.record import Row
from eopd.run.storage import free_bytes

LOCK: Final = "run.lock"
STOP: Final = "stop.json"  # a request of ``eopd stop``
MOST_SHOWN: Final = 3
PROBE: Final = ".eopd-check-"
# `.versions.json.partial` is there where a process was killed while it wrote its first file
_PROVE_NOTHING: Final = (LOCK, STOP, ".versions.json.partial")


def holds_rows(path: Path) -> bool:
    """Tells whether a run has finished a step in a directory, or written a checkpoint."""
    return any((path / name).exists() for name in ("metrics.jsonl", "trained.jsonl", "checkpoints"))


def require_run_directory(path: Path) -> None:
    """Checks that the run directory can be made and written; leaves nothing there.

    Raises:
        ConfigError: it cannot, or there is a file in its place.
    """
    try:
        with suppress(FileNotFoundError):
            path.lstat()

        existing = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
        with tempfile.TemporaryDirectory(dir=existing, prefix=PROBE):
            return
    except OSError as error:
        verb = "written" if os.path.isdir(path) else "made"
        raise ConfigError(f"run.directory: {path} cannot be {verb} ({error.strerror})") from None


def require_no_foreign_files(path: Path) -> None:
    """Checks that the run directory is missing, empty, or a run of eopd: a run that begins clears it.

    A run is proved by the content of its ``versions.json``, which is written first, or of its
    ``config.yaml``, or by a checkpoint with a manifest. The names of the two files prove nothing,
    since other programs use them too.

    Raises:
        ConfigError: the directory holds something else.
    """
    try:
        names = sorted(os.listdir(path)) if os.path.lexists(path) else []
    except OSError as error:
        raise ConfigError(f"run.directory: {path} cannot be read ({error.strerror})") from None

    names = [name for name in names if name not in _PROVE_NOTHING and not name.startswith(PROBE)]
    is_run = (
        _names_versions_of_eopd(path / "versions.json")
        or _is_config(path / "config.yaml")
        or any(path.glob("checkpoints/step-*/manifest.json"))
    )
    if names and not is_run:
        more = ", ..." if len(names) > MOST_SHOWN else ""
        raise ConfigError(
            f"run.name: {path} holds {', '.join(names[:MOST_SHOWN])}{more} and is no run of "
            "eopd; name another run.name"
        )


def _names_versions_of_eopd(path: Path) -> bool:
    try:
        versions = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False

    return isinstance(versions, dict) and "eopd" in versions


def _is_config(path: Path) -> bool:
    try:
        load_config(path)
    except ConfigError:
        return False

    return True


def free_row(path: Path) -> Row:
    """Returns the metric of the space that is free for a run directory; nothing where the file system
    does not say.
    """
    free = free_bytes(path)
    return {} if free == math.inf else {"eopd_run_free_bytes": float(free)}
