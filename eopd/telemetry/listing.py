"""``eopd list``: the runs of a directory at a glance, from their files."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import rich.console
from rich.table import Table
from rich.text import Text

from eopd.config import ConfigError
from eopd.config.benchmark import HELD_OUT
from eopd.config.saved import require_directory
from eopd.run.directory import RunDirectory
from eopd.run.evaluations import read_evaluations
from eopd.run.record import Summary
from eopd.telemetry.plain import terminal

_WIDEST: Final = 1000
_UNITS: Final = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """A run in the list. ``changed_at`` is in seconds since 1970; ``fault`` says why its files
    cannot be read.
    """

    name: str
    status: str
    step: int = 0
    batches: int = 0
    reverse_kl: float | None = None
    changed_at: float
    fault: str | None = None


def runs_in(directory: Path) -> list[Listed]:
    """Returns the runs in a directory and in the directories of its sweeps, the last changed first.

    Raises:
        ConfigError: there is no such directory.
    """
    require_directory(directory)
    runs = [_listed(path, str(path.relative_to(directory))) for path in _below(directory)]
    return sorted(runs, key=lambda run: run.changed_at, reverse=True)


def directories_in(directory: Path) -> list[Path]:
    """Returns the directory itself where it is that of a run, or holds none; else those of the runs in
    it and in its sweeps, by name.

    Raises:
        ConfigError: there is no such directory.
    """
    require_directory(directory)
    is_run = (directory / "config.yaml").exists()
    return [directory] if is_run else sorted(_below(directory)) or [directory]


def _below(directory: Path) -> list[Path]:
    """Returns the directories of the runs in a directory and in those of its sweeps, each once."""
    configs = [*directory.glob("*/config.yaml"), *directory.glob("*/*/config.yaml")]
    configs.sort(key=lambda path: not (path.parent.is_symlink() or path.parent.parent.is_symlink()))
    once = {path.resolve(): path.parent for path in configs}  # the last of a run is behind no link
    return list(once.values())


def print_runs(runs: Sequence[Listed], output: rich.console.Console | None = None) -> None:
    """Print runs as a table, and below it what cannot be read."""
    # a program that reads it wants whole names
    output = output or terminal(width=None if sys.stdout.isatty() else _WIDEST)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("run", "status", "step", "held-out reverse KL", "changed"):
        right = heading in ("step", "held-out reverse KL", "changed")
        table.add_column(
            heading, header_style="dim", justify="right" if right else "left", overflow="fold"
        )

    for run in runs:
        kl = "-" if run.reverse_kl is None else f"{run.reverse_kl:.3f}"
        steps = "-" if run.fault else f"{run.step}/{run.batches}"
        table.add_row(
            Text(run.name),
            Text(run.status),
            steps,
            kl,
            f"{_age(run.changed_at)} ago",
        )

    output.print(table)
    for run in runs:
        if run.fault:
            output.print(Text(f"{run.name}: {run.fault}"), soft_wrap=True)


def _listed(path: Path, name: str) -> Listed:
    directory = RunDirectory(path)
    changed_at = (path / "config.yaml").stat().st_mtime
    try:
        config, status = directory.config(), directory.status()
        summary = directory.read_summary()
        rows, reverse_kl = directory.last_rows(1), _reverse_kl(directory, summary)
    except (ConfigError, OSError) as error:
        fault = str(error).splitlines()[0]
        return Listed(name=name, status="unreadable", changed_at=changed_at, fault=fault)

    return Listed(
        name=name,
        status=status.split()[0],
        step=int(rows[-1]["eopd_step"]) if rows else 0,
        batches=config.run.batches,
        reverse_kl=reverse_kl,
        changed_at=rows[-1]["time"] if rows else changed_at,
    )


def _reverse_kl(directory: RunDirectory, summary: Summary | None) -> float | None:
    """Returns the newest held-out reverse KL in nats, also one that was measured while training."""
    newest = {one.name: one.measurements for one in read_evaluations(directory.evaluations)}
    measured = newest.get(HELD_OUT)
    if measured is None and summary is not None:
        measured = summary.held_out.after or summary.held_out.before

    kl = None if measured is None else measured.get("reverse_kl")
    return None if kl is None else kl.mean


def _age(moment: float) -> str:
    """Returns the time since a moment in its largest unit, such as ``3 h``."""
    seconds = max(0.0, time.time() - moment)
    size, unit = next(((size, unit) for size, unit in _UNITS if seconds >= size), _UNITS[-1])
    return f"{seconds / size:.0f} {unit}"
