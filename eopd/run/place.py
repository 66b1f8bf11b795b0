"""Where a run will write, looked at before it begins: it can be written, and holds nothing of
anybody else.
"""

import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Final

from eopd.config import ConfigError, load_config

LOCK: Final = "run.lock"
MOST_SHOWN: Final = 3
PROBE: Final = ".eopd-check-"


def holds_rows(path: Path) -> bool:
    """Whether a run has come as far as a step there, or a checkpoint."""
    return any((path / name).exists() for name in ("metrics.jsonl", "trained.jsonl", "checkpoints"))


def require_run_directory(path: Path) -> None:
    """The run directory can be made and written; nothing is left there.

    Raises:
        ConfigError: it cannot, or there is a file in its place.
    """
    try:
        with suppress(FileNotFoundError):
            path.lstat()

        there = next(directory for directory in (path, *path.parents) if os.path.lexists(directory))
        with tempfile.TemporaryDirectory(dir=there, prefix=PROBE):
            return
    except OSError as error:
        verb = "written" if os.path.isdir(path) else "made"
        raise ConfigError(f"run.directory: {path} cannot be {verb} ({error.strerror})") from None


def require_no_foreign_files(path: Path) -> None:
    """The run directory is not there yet, holds nothing, or holds a run of eopd: a run that begins
    clears it.

    What proves a run is its ``versions.json``, which is written first, its ``config.yaml`` or a
    checkpoint with its manifest. The names of the two files prove nothing, since other programs use
    them too.

    Raises:
        ConfigError: it holds something else.
    """
    try:
        names = sorted(os.listdir(path)) if os.path.lexists(path) else []
    except OSError as error:
        raise ConfigError(f"run.directory: {path} cannot be read ({error.strerror})") from None

    if found := [name for name in names if name != LOCK and not name.startswith(PROBE)]:
        if (
            _names_versions_of_eopd(path / "versions.json")
            or _is_config(path / "config.yaml")
            or any(path.glob("checkpoints/step-*/manifest.json"))
        ):
            return

        more = ", ..." if len(found) > MOST_SHOWN else ""
        raise ConfigError(
            f"run.name: {path} holds {', '.join(found[:MOST_SHOWN])}{more} and is no run of "
            "eopd; name another run.name"
        )


def _names_versions_of_eopd(path: Path) -> bool:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False

    return isinstance(found, dict) and "eopd" in found


def _is_config(path: Path) -> bool:
    try:
        load_config(path)
    except ConfigError:
        return False

    return True
