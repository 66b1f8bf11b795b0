"""Tells a Prometheus where to scrape, by a file in a folder that it watches (``file_sd_configs``).

A file has one target. It stays where the process fails or is killed, so that the target is missed. Its
name is made of the machine and of what is served there: whoever goes on there replaces it. The file
of a run that nobody replaces is harmless, since no rule asks whether its target answers.
"""

import hashlib
import json
import os
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from eopd.config import ConfigError

_ANY_ADDRESS: Final = frozenset({"0.0.0.0", "::"})


def require_discovery(folder: Path) -> None:
    """Raise unless ``announced`` could write there now.

    Raises:
        ConfigError: the folder cannot be made, or takes no files.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"telemetry.discovery: {folder} takes no files ({error.strerror}); name a folder that "
            "Prometheus watches, or null"
        ) from None


@contextmanager
def announced(
    folder: Path | None, address: str, identity: Path, labels: Mapping[str, str]
) -> Iterator[None]:
    """While the block runs, and after it has failed, a file in the folder has this target; without a
    folder there is none.

    Args:
        folder: the folder, which is made where it is missing.
        address: ``host:port`` as it is served; where that is every address of this machine, the
            machine's name stands in the file.
        identity: what is served there, the same whenever it is served again.
        labels: what Prometheus adds to each series of the target.

    Raises:
        ConfigError: the folder takes no files.
    """
    if folder is None:
        yield
        return

    require_discovery(folder)
    node = socket.gethostname()
    digest = hashlib.sha256(f"{node}:{identity}".encode()).hexdigest()[:12]
    path = folder / f"{identity.name}-{digest}.json"
    targets = [{"targets": [_reachable(address, node)], "labels": {**labels, "node": node}}]
    _write(path, json.dumps(targets, indent=1) + "\n")
    yield
    path.unlink(missing_ok=True)


def _reachable(address: str, node: str) -> str:
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if host in _ANY_ADDRESS:
        host = node

    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _write(path: Path, text: str) -> None:
    """Replaces the file whole; Prometheus reads whatever ends in .json."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        with suppress(OSError):  # of a file system without modes
            partial.chmod(0o644)  # Prometheus is another user

        os.replace(partial, path)
    except OSError as error:
        raise ConfigError(
            f"telemetry.discovery: {path} cannot be written ({error.strerror})"
        ) from None
