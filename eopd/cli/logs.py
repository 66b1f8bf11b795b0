"""``eopd logs`` prints what the processes of a run wrote, or its job."""

import time
from functools import partial
from typing import Annotated, Final

import typer

from eopd.cli.commands import JobServer, RunPath
from eopd.config import ConfigError
from eopd.run.directory import RunDirectory
from eopd.run.lock import holder
from eopd.run.log_lines import Log, files_of, merged

POLL_S: Final = 0.5


def logs(
    run: RunPath,
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
    address: JobServer = None,
) -> None:
    """Print the last lines of a run's logs, those of all its processes in the order of their
    times; of a job, what it has written on its terminal.
    """
    if address is not None:
        if role is not None:
            raise ConfigError(
                f"--role {role}: goes with a run directory; a job writes what its driver says"
            )

        return _print_job(str(run), address, lines, follow=follow)

    directory = RunDirectory(run)
    directory.config()
    reading = {path: Log(path) for path in files_of(directory.logs, role)}
    last = merged([log.last(lines) for log in reading.values()])
    for line in last[-lines:] if lines else []:
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


def _print_job(name: str, address: str, lines: int, *, follow: bool) -> None:
    """Prints the last lines of a job, and follows it if asked to."""
    from eopd.runtime.jobs import connect, server_address

    jobs = connect(server_address(address))
    text = jobs.log_of(name)
    written = text.splitlines(keepends=True)
    typer.echo("".join(written[-lines:] if lines else []), nl=False)
    if follow:
        job = jobs.follow(name, partial(typer.echo, nl=False), skipped=len(text))
        typer.echo(f"job {name} has ended: {job.status}", err=True)
