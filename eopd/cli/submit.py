"""``eopd submit`` trains on a Ray cluster that runs already, as a job of its job server."""

import os
import re
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

import typer

from eopd.cli.commands import (
    EXIT_INTERRUPTED,
    EXIT_MISTAKEN,
    ConfigFile,
    Overrides,
    train_command,
)
from eopd.cli.paths import blame_user
from eopd.config import Config, ConfigError, load_config, read_leaves
from eopd.config.teacher import NAME, NAME_WORDS, VARIABLE

if TYPE_CHECKING:
    from eopd.runtime.jobs import Job, Jobs

_NOT_FOUND: Final = 127  # of a shell, for a command
_FILLED_IN: Final = re.compile(r"\$[\w{]")  # which Ray fills in, also within a value

_Address = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="The job server of the cluster, e.g. http://HEAD:8265; else RAY_API_SERVER_ADDRESS, or "
        "RAY_ADDRESS where that begins with http.",
    ),
]
_Resume = Annotated[
    Literal["no", "yes", "auto"],
    typer.Option(metavar="[auto]", show_default=False, help="As for `eopd train`."),
]
_Variables = Annotated[
    list[str] | None,
    typer.Option(
        "--env",
        metavar="NAME",
        help="Give the job this environment variable of yours, e.g. HF_TOKEN; may be given more "
        "than once. Those that teachers[].server.api_key_env names are given by themselves.",
    ),
]
_Include = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="PATH",
        help="Upload this file or folder of the working directory too; may be given more than once.",
    ),
]
_NoWait = Annotated[
    bool, typer.Option("--no-wait", help="Print the job's id, and do not wait for its end.")
]
_Name = Annotated[
    str | None, typer.Option(metavar="ID", help="The id of the job; else Ray gives it one.")
]


def submit(
    config: ConfigFile,
    address: _Address = None,
    overrides: Overrides = None,
    resume: _Resume = "no",
    variables: _Variables = None,
    include: _Include = None,
    no_wait: _NoWait = False,
    name: _Name = None,
) -> None:
    """Train on a Ray cluster that runs already, as a job; print what it writes until it ends, with
    its exit code. Ctrl-C ends the printing alone.

    The config and the files of the working directory that it names are uploaded. Models and the run
    directory lie where every node of the cluster sees them.
    """
    resolved = load_config(config, overrides or [])
    _require_for_jobs(resolved, name)
    environment = _given(variables or []) | dict(_keys_of(resolved))
    from eopd.run.provenance import COMMIT, commit_of
    from eopd.runtime.job_files import files_of_job
    from eopd.runtime.jobs import connect, server_address

    jobs_address = server_address(address)
    files = files_of_job(config, resolved, read_leaves(config, overrides or []), include or [])
    jobs = connect(jobs_address)
    if commit := commit_of(Path()):
        environment.setdefault(COMMIT, commit)

    options = {"no": [], "yes": ["--resume"], "auto": ["--resume", "auto"]}[resume]
    again = ["--address", jobs.address, "--resume", "auto"]
    again += [word for variable in variables or [] for word in ("--env", variable)]
    again += [word for path in include or [] for word in ("--include", str(path))]
    with tempfile.TemporaryDirectory(prefix="eopd-job-") as folder, blame_user(config):
        files.copy_to(Path(folder))
        job = jobs.submit(
            train_command(files.config, overrides or [], options),
            Path(folder),
            environment,
            run=resolved.run.path,
            again=train_command(config, overrides or [], again, verb="submit"),
            name=name,
        )

    _say(f"submitted {job}, which writes {resolved.run.path}")
    for line in _commands(job, jobs.address):
        _say(line)

    if no_wait:
        typer.echo(job)
        return

    _follow(jobs, job)


def _require_for_jobs(config: Config, name: str | None) -> None:
    """Checks what only a job forbids."""
    if name is not None and not re.fullmatch(NAME, name):
        raise ConfigError(f"--name: must be {NAME_WORDS} (is {name!r})")

    if config.cluster.cpus is not None:
        raise ConfigError(
            f"cluster.cpus: {config.cluster.cpus:g} is for Ray started by a run, and a job joins "
            "the cluster that it is submitted to; set it to null"
        )


def _given(names: Sequence[str]) -> dict[str, str]:
    """Returns the variables that ``--env`` names, with their values.

    Raises:
        ConfigError: one is not set, or was given with a value; the value is not repeated.
    """
    found = {}
    for text in names:
        name, equals, _ = text.partition("=")
        if equals:
            raise ConfigError(
                f"--env {name}=...: takes the name alone, since a command line is seen by others "
                f"and kept by the shell; set {name} in this shell, and give --env {name}"
            )

        if not re.fullmatch(VARIABLE, name):
            raise ConfigError(f"--env {name}: must be the name of an environment variable")

        if (value := os.environ.get(name)) is None:
            raise ConfigError(f"--env {name}: this variable is not set here")

        _require_as_it_is("--env", name, value)
        found[name] = value

    return found


def _keys_of(config: Config) -> Iterator[tuple[str, str]]:
    """Yields the variables that hold the keys of teachers' servers, with their values; says which
    are not set here.
    """
    for teacher in config.teachers:
        name = teacher.server.api_key_env if teacher.server else None
        if name is None:
            continue

        key = f"teachers.{teacher.name}.server.api_key_env"
        if value := os.environ.get(name):
            _require_as_it_is(key, name, value)
            yield name, value
        else:
            _say(f"note: {key}: {name} is not set here; it must be set on the cluster's nodes")


def _require_as_it_is(key: str, name: str, value: str) -> None:
    if _FILLED_IN.search(value):
        raise ConfigError(
            f"{key}: the value of {name} has a $ before a name, which Ray would fill in; set this "
            "variable on the cluster's nodes"
        )


def _commands(job: str, address: str) -> list[str]:
    """Returns lines that say how to follow a job, to look at it and to stop it."""
    where = shlex.join([job, "--address", address])
    return [
        f"follow it with: eopd logs {where} --follow",
        f"look at it with: eopd status {where}",
        f"stop it, with a checkpoint: eopd stop {where}",
    ]


def _follow(jobs: "Jobs", name: str) -> None:
    """Prints what a job writes, and exits as it does.

    Raises:
        typer.Exit: the job has failed or was stopped, or the printing was interrupted.
    """
    try:
        job = jobs.follow(name, partial(typer.echo, nl=False))
    except KeyboardInterrupt:
        _say(f"\nno longer following; job {name} goes on")
        for line in _commands(name, jobs.address):
            _say(line)

        raise typer.Exit(EXIT_INTERRUPTED) from None

    code = exit_code(job)
    _say(f"job {name} has ended: {job.status}, exit code {code}")
    if job.status == "FAILED" and job.exit_code is None:
        _say(f"Ray says: {job.message}")

    if code == _NOT_FOUND:
        _say(
            "the shell of the job found no eopd: start Ray, on every node, in the environment that "
            "has it (. .venv/bin/activate)"
        )
    elif (again := continued_by(job)) is not None:
        _say(f"continue with: {again}")

    if code:
        raise typer.Exit(code)


def exit_code(job: "Job") -> int:
    """Returns the exit code of a job that has ended: that of its command; 130 where it was stopped,
    as of `eopd train`; 128 and the signal where one killed it; 1 where it never started.
    """
    if job.status == "STOPPED":
        return EXIT_INTERRUPTED

    if job.exit_code is None:
        return 0 if job.status == "SUCCEEDED" else 1

    return job.exit_code if job.exit_code >= 0 else 128 - job.exit_code


def continued_by(job: "Job") -> str | None:
    """Returns the command that continues a job that has ended, in the folder that it was submitted
    from; None where nothing does.
    """
    if job.again is None or not job.is_over or exit_code(job) in (0, EXIT_MISTAKEN):
        return None

    return job.again


def _say(text: str) -> None:
    typer.echo(text, err=True)
