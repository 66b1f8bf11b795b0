"""``eopd logs`` prints what the processes of a run wrote."""

import time
from pathlib import Path
from typing import Annotated, Final

import typer

from eopd.run.directory import RunDirectory
from eopd.run.lock import holder
from eopd.run.log_lines import Log, files_of, merged

POLL_S: Final = 0.5


def logs(
    run: Annotated[Path, typer.Argument(help="A run directory, e.g. runs/NAME.")],
    role: Annotated[
        str | None,
        typer.Option(help="Of one role, e.g. driver, rollout-0, or rollout for every engine."),
    ] = None,
    follow: Annotated[
        bool,
        typer.Option(
            "--follow",
            "-f",
            help="Go on with what is written, until the run ends.",
        ),
    ] = False,
    lines: Annotated[
        int,
        typer.Option(
            "--lines",
            "-n",
            min=0,
            help="How many of the last.",
        ),
    ] = 50,
) -> None:
    """Print the last lines of a run's logs, those of all its processes in the order of their
    times.
    """
    directory = RunDirectory(run)
    directory.config()
    reading = {path: Log(path) for path in files_of(directory.logs, role)}
    last = merged([log.last(lines) for log in reading.values()])
    for line in last[len(last) - lines :] if lines else []:
        typer.echo(line)

    while follow:
        is_running = holder(run) is not None
        for path in files_of(directory.logs, role):
            reading.setdefault(path, Log(path))

        for line in merged([list(log.added()) for log in reading.values()]):
            typer.echo(line)

        if not is_running:
            return

        time.sleep(POLL_S)
