"""The command line has one function for each command. It hands the work to a room; a mistake of the
user becomes one message and exit code 2.
"""

import errno
import json
import re
import shlex
import sys
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

import typer
import typer.core
from pydantic import ValidationError

from eopd import __version__
from eopd.cli.check import check
from eopd.cli.commands import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    SET_EPILOG,
    ConfigFile,
    Overrides,
    RunPath,
    job_again,
    place_of_moved,
    train_command,
)
from eopd.cli.config import config
from eopd.cli.evaluate import evaluate
from eopd.cli.export import export
from eopd.cli.fork import fork
from eopd.cli.init import data_to_make, recipe_names, write_recipe
from eopd.cli.listing import list_runs
from eopd.cli.logs import logs
from eopd.cli.models import models
from eopd.cli.paths import blame_user
from eopd.cli.plan import plan
from eopd.cli.profile import profile
from eopd.cli.show import show
from eopd.cli.status import status
from eopd.cli.stop import stop
from eopd.cli.submit import submit
from eopd.cli.sweep import sweep
from eopd.cli.teacher import teacher
from eopd.cli.terminal import outlive_readers, write_anything
from eopd.config import ConfigError, RunConfig, load_config
from eopd.config.messages import wrong_option
from eopd.config.teacher import NAME, NAME_WORDS
from eopd.runtime import spawned  # noqa: F401  garbage collection is rarer from here
from eopd.telemetry.plain import say, terminal
from eopd.types import RunFailedError


class _Verbs(typer.core.TyperGroup):
    """Commands whose options have the messages of config keys where a value is wrong."""

    def invoke(self, ctx: typer.Context) -> object:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            if not isinstance(error.__cause__, ValidationError) or error.param is None:
                raise

            detail = error.__cause__.errors(include_url=False)[0]
            raise ConfigError(f"{max(error.param.opts, key=len)}: {wrong_option(detail)}") from None


HELP = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    cls=_Verbs,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings=HELP,
)


@app.callback(invoke_without_command=True)
def _eopd(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Entropy-aware on-policy distillation on Ray, vLLM and DeepSpeed."""
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def init(
    recipe: Annotated[str, typer.Argument(help=f"One of {', '.join(recipe_names())}.")],
) -> None:
    """Write a recipe and its prompts into configs/ of the current folder; nothing is
    overwritten.
    """
    written, command = write_recipe(recipe, Path())
    for path in written:
        typer.echo(f"wrote {path}")

    if not written:
        typer.echo("everything is there already")

    if files := data_to_make(recipe, Path()):
        rows = "your rows, which no recipe brings: docs/quickstart.md#your-data"
        typer.echo(f"first make {' and '.join(files)} ({rows})")

    typer.echo(f"next: {command}")


class _Train(typer.core.TyperCommand):
    """A command with an option ``--resume`` that may stand alone, and then means ``--resume=yes``; the
    word after it may be the config.
    """

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        for index, argument in enumerate(args):
            if argument == "--resume" and args[index + 1 : index + 2] != ["auto"]:
                args[index] = "--resume=yes"

        return super().parse_args(ctx, args)


@app.command(cls=_Train, epilog=SET_EPILOG)
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[
        Literal["no", "yes", "auto"],
        typer.Option(
            metavar="[auto]",
            show_default=False,
            help="Continue the run from its newest checkpoint; with auto, start it where "
            "there is none, and do nothing where it is complete: one command for a "
            "scheduler to repeat.",
        ),
    ] = "no",
    step: Annotated[
        int | None,
        typer.Option(min=1, help="With --resume: go back to the checkpoint of this step."),
    ] = None,
) -> None:
    """Train a student, on this machine or on a Ray cluster."""
    if step is not None and resume != "yes":
        raise ConfigError(
            f"--step {step}: goes with --resume alone; repeated, it would go back every time"
        )

    resolved = load_config(config, overrides or [])
    if resume != "no":
        _require_own_config(config, resolved.run, overrides or [])

    from eopd.run.directory import RunDirectory
    from eopd.runtime.train import train as run
    from eopd.telemetry.console import print_summary

    outlive_readers()
    try:
        summary, has_trained = run(
            resolved, resume=resume, step=step, say=partial(typer.echo, err=True)
        )
    except RunFailedError:
        _say_how_to_continue(config, overrides or [], resolved.run.path, ["--resume", "auto"])
        raise

    directory = RunDirectory(resolved.run.path)
    if not has_trained:
        batches = resolved.run.batches
        typer.echo(
            f"{directory.path} is complete: {batches} of {batches} steps; raise "
            "run.batches to train it further"
        )

    print_summary(summary, directory.samples(), directory.path)
    if directory.report.exists():
        typer.echo(f"report: {directory.report}")

    if summary.status == "collapsed":
        raise typer.Exit(EXIT_FAILED)

    if summary.status != "completed":
        _say_how_to_continue(config, overrides or [], directory.path, directory.resume_options())
        raise typer.Exit(EXIT_INTERRUPTED)


def _say_how_to_continue(config: Path, overrides: list[str], run: Path, options: list[str]) -> None:
    """Prints what continues a run. The config of a job is gone with the job."""
    from eopd.runtime.cluster import is_job_copy

    command = train_command(config, overrides, options)
    if is_job_copy(Path.cwd()):
        command = job_again(run)

    typer.echo(f"continue with: {command}")


def _require_own_config(config: Path, run: RunConfig, overrides: list[str]) -> None:
    """Checks that the config in the directory of a run is not one of a copy, by which another run would
    go on.

    Raises:
        ConfigError: it is, and no override says where the run is.
    """
    named = any(text.startswith(("run.name=", "run.directory=", "run=")) for text in overrides)
    if named or config.name != "config.yaml" or not (config.parent / "summary.json").exists():
        return

    if moved := place_of_moved(config.parent, run):
        places = " ".join(f"--set {shlex.quote(override)}" for override in moved)
        own = f"add {places}"
        if not re.fullmatch(NAME, name := config.parent.resolve().name):
            own = f"rename its directory, as {name!r} is no run.name ({NAME_WORDS})"

        raise ConfigError(
            f"--resume: {config} lies with a run that was copied or moved, and names {run.path}; to go "
            f"on with the one where it lies {own}; with the other name its own config"
        )


@app.command(epilog=SET_EPILOG)
def measure(
    run: RunPath,
    step: Annotated[
        int | None, typer.Option(min=1, help="Of which checkpoint; else the newest.")
    ] = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Measure the student of a checkpoint on the run's held-out prompts, with actors of its own; the
    run stays as it is.
    """
    from eopd.runtime.measure import measure_checkpoint
    from eopd.telemetry.console import print_measured

    measured = measure_checkpoint(run, step, overrides or [], partial(typer.echo, err=True))
    if as_json:
        numbers = {name: asdict(value) for name, value in measured.items()}
        typer.echo(json.dumps(numbers, allow_nan=False))
    else:
        print_measured(measured)


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Run directories, e.g. runs/NAME, or one that holds some, such as a sweep's; several "
            "are shown together."
        ),
    ],
    output: Annotated[
        Path | None, typer.Option(help="Else RUN/report.html, or ./report.html of several.")
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Leave out paths, hosts and users, to give it away.")
    ] = False,
) -> None:
    """Write what runs did, also one under way, into one HTML file that opens anywhere."""
    from eopd.telemetry.listing import directories_in
    from eopd.telemetry.report.page import write_report

    target = output or (runs[0] if len(runs) == 1 else Path()) / "report.html"
    with blame_user(target):
        shown = list(dict.fromkeys(chain.from_iterable(map(directories_in, runs))))
        leave_out = partial(typer.echo, err=True) if len(shown) > 1 else None
        write_report(shown, target, public=public, leave_out=leave_out)

    typer.echo(target)


@app.command()
def scale(
    run: Annotated[
        Path, typer.Argument(help="The directory of a run that is running, e.g. runs/NAME.")
    ],
    engines: Annotated[int, typer.Option(min=1, help="How many rollout engines it shall have.")],
) -> None:
    """Add rollout engines to a running job, or let some finish what they have and end."""
    from eopd.run.directory import RunDirectory

    with blame_user(run):
        RunDirectory(run).ask_for_engines(engines)

    typer.echo(
        f"asked for {engines} rollout engines; the job says when they are there "
        "(metric eopd_engines_up)"
    )


for verb in (status, stop, show, logs, fork, sweep):
    app.command()(verb)

for verb_of_config in (check, plan, profile, export):
    app.command(epilog=SET_EPILOG)(verb_of_config)

app.command(cls=_Train, epilog=SET_EPILOG)(submit)
app.command("list")(list_runs)
app.command("eval")(evaluate)
app.add_typer(config, name="config")
app.add_typer(models, name="models")
app.add_typer(teacher, name="teacher")


def main() -> None:
    """Runs the ``eopd`` command."""
    write_anything()
    try:
        app()
    except (ConfigError, RunFailedError) as error:
        _print_error(f"error: {error}")
        sys.exit(error.exit_code if isinstance(error, ConfigError) else EXIT_FAILED)
    except OSError as error:
        if error.filename is None and error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise

        _print_error(f"error: {error}")
        sys.exit(1)
    except SystemExit as end:
        # typer turns Ctrl-C into this
        if end.__context__ and isinstance(end.__context__.__cause__, KeyboardInterrupt):
            _print_error("interrupted")

        raise


def _print_error(text: str) -> None:
    say(terminal(stderr=True), text)
