"""``eopd stop`` asks the process of a run to end, and waits until it has."""

import socket
import time
from pathlib import Path
from typing import Annotated, Final

import typer

from eopd.cli.commands import JobServer
from eopd.cli.paths import blame_user
from eopd.config import ConfigError
from eopd.config.saved import require_directory
from eopd.run.directory import RunDirectory
from eopd.run.lock import Holder, holder, last_holder
from eopd.run.stopping import ask_to_stop, is_taken, withdraw
from eopd.types import RunFailedError

POLL_S: Final = 0.5
PATIENCE_S: Final = 30.0  # the run looks every second, unless it is busy starting


def stop(
    run: Annotated[
        Path, typer.Argument(help="The directory of a run that is running, e.g. runs/NAME.")
    ],
    now: Annotated[
        bool, typer.Option("--now", help="At once, without a checkpoint of the step under way.")
    ] = False,
    address: JobServer = None,
) -> None:
    """Ask a run to end after the step under way, with a checkpoint, as SIGTERM does, and wait for
    it; from any machine that sees its directory, or its job server. Ctrl-C ends the wait alone.
    """
    if address is not None:
        if now:
            raise ConfigError("--now: goes with a run directory; `ray job stop` cannot ask for it")

        return _stop_job(str(run), address)

    process, is_certain = _process_of(run)
    with blame_user(run):
        ask_to_stop(run, process, now=now)

    how = "at once" if now else "after the step under way, with a checkpoint"
    typer.echo(f"asked {process} to end {how}")
    _wait(run, process, is_certain=is_certain)
    directory = RunDirectory(run)
    status = directory.status() if directory.holds_a_run() else "before it had begun"
    typer.echo(f"{run} has ended: {status}")


def _stop_job(name: str, address: str) -> None:
    """Asks the job of a run to end, and waits until it has.

    Raises:
        ConfigError: it has ended, or Ray would kill it before its checkpoint is written.
    """
    from eopd.cli.submit import continued_by
    from eopd.runtime.jobs import STOP_WAIT, connect, server_address

    jobs = connect(server_address(address))
    job = jobs.look_up(name)
    if job.is_over:
        raise ConfigError(f"job {name} is {job.status}: only a job that is running can be stopped")

    if not job.ends_softly:
        raise ConfigError(
            f"job {name}: was submitted without {STOP_WAIT}. Unless the head of the cluster sets it, "
            "Ray would kill the job after 3 s, and the steps since its last checkpoint would be lost; "
            "`eopd stop RUN_DIRECTORY` ends it with a checkpoint"
        )

    jobs.stop(name)
    typer.echo(f"asked job {name} to end after the step under way, with a checkpoint")
    ended = jobs.wait(name)
    typer.echo(f"job {name} has ended: {ended.status}")
    if (again := continued_by(ended)) is not None:
        typer.echo(f"continue, in the folder that it was submitted from, with: {again}")


def _process_of(run: Path) -> tuple[Holder, bool]:
    """Returns the process that runs a run, and whether the lock proves that it does.

    Raises:
        ConfigError: there is none.
    """
    require_directory(run)
    if (process := holder(run)) is not None:
        return process, True

    status = RunDirectory(run).status()
    last = last_holder(run)
    if last is not None and last.host != socket.gethostname():
        return last, False

    raise ConfigError(f"{run} is {status}: only a run that is running can be stopped")


def _wait(run: Path, process: Holder, *, is_certain: bool) -> None:
    """Waits until a process has ended its run.

    Raises:
        RunFailedError: nobody takes the request, and the process may be gone.
    """
    asked_at, is_told = time.monotonic(), False
    while last_holder(run) == process and not (is_certain and holder(run) is None):
        time.sleep(POLL_S)
        if is_told or is_taken(run) or time.monotonic() - asked_at < PATIENCE_S:
            continue

        if not is_certain:
            withdraw(run)
            raise RunFailedError(
                f"nobody has taken the request within {PATIENCE_S:.0f} s: {process}, is gone, or "
                f"does not see this directory. Look on {process.host}"
            )

        is_told = True
        typer.echo(
            f"not taken within {PATIENCE_S:.0f} s: the process is starting, or hangs. Still "
            f"waiting; on {process.host}, kill -TERM {process.pid} asks it by a signal"
        )

    withdraw(run)
