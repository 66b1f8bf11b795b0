"""``eopd status`` says how far a run is, from its files, or how its job is, from the job server."""

from pathlib import Path

import typer

from eopd.cli.commands import (
    JobServer,
    RunPath,
    job_again,
    place_of_moved,
    train_command,
)


def status(
    run: RunPath,
    address: JobServer = None,
) -> None:
    """Say how far a run is, whether it is running or has ended."""
    from eopd.run.directory import RunDirectory

    if address is None:
        return _print_run(run)

    from eopd.cli.submit import continued_by
    from eopd.runtime.jobs import connect, server_address

    job = connect(server_address(address)).look_up(str(run))
    typer.echo(f"job {job.name}: {job.status}")
    typer.echo(f"command: {job.command}")
    if (again := continued_by(job)) is not None:
        typer.echo(f"continue, in the folder that it was submitted from, with: {again}")

    if job.run is None:
        return

    typer.echo(f"run directory: {job.run}")
    if RunDirectory(job.run).holds_a_run():
        _print_run(job.run, is_told=job.again is not None)
    else:
        typer.echo(
            "it is not seen from this machine, or not begun; on one that sees it, `eopd status "
            f"{job.run}` says how far the run is"
        )


def _print_run(run: Path, *, is_told: bool = False) -> None:
    """Prints how far a run is, and what continues it, unless that is told already."""
    from eopd.run.directory import RunDirectory
    from eopd.run.evaluations import newest, read_evaluations
    from eopd.telemetry.console import PACE_WINDOW
    from eopd.telemetry.status import print_status

    directory = RunDirectory(run)
    settings, status = directory.config().run, directory.status()
    summary, rows = directory.read_summary(), directory.last_rows(PACE_WINDOW + 1)
    stopped = status.split()[0] in ("dead", "interrupted", "failed")
    overrides = place_of_moved(run, settings)
    again = train_command(run / "config.yaml", overrides, directory.resume_options())
    if "/working_dir_files/" in (run / "config.yaml").read_text(encoding="utf-8"):
        again = job_again(run)

    advice = f"continue with: {again}" if stopped and not is_told else None
    print_status(
        settings.name,
        status,
        summary,
        rows,
        batches=settings.batches,
        evaluations=newest(read_evaluations(directory.evaluations)),
        advice=advice,
    )
