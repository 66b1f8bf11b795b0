"""Where a run comes from: the commit of the working directory, and the processor that ran it."""

import subprocess
from pathlib import Path
from typing import Final

_CPUINFO: Final = Path("/proc/cpuinfo")
_TIMEOUT_S: Final = 5.0


def provenance(working_directory: Path = Path()) -> dict[str, object]:
    """Returns what is known of ``commit`` (with ``-dirty`` where files were changed since) and
    ``cpu_model``; a working directory that is in no repository has no commit.
    """
    found = {"commit": _commit(working_directory), "cpu_model": _cpu_model()}
    return {name: value for name, value in found.items() if value}


def _commit(directory: Path) -> str | None:
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


def _cpu_model() -> str | None:
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None

    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, None)
