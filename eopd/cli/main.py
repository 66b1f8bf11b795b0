"""The command line: verbs only; every one hands its work to a room and turns a user's mistake into one message and exit
code 2.
"""

import sys
from pathlib import Path
from typing import Annotated, Literal

import rich.console
import typer

from eopd import __version__
from eopd.cli.evaluate import evaluate
from eopd.cli.init import recipe_names, write_recipe
from eopd.cli.teacher import teacher
from eopd.config import ConfigError, load_config
from eopd.types import RunFailedError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
models = typer.Typer(no_args_is_help=True, help="Make the models that the shipped configs use.")
app.add_typer(models, name="models")
app.add_typer(teacher, name="teacher")
app.command("eval")(evaluate)

MODELS = Path("~/.cache/eopd/models")
EXIT_INTERRUPTED = 130


@app.callback(invoke_without_command=True)
def _eopd(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """Entropy-aware on-policy distillation on Ray, vLLM and DeepSpeed."""
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def init(
    recipe: Annotated[str, typer.Argument(help=f"One of {', '.join(recipe_names())}.")],
) -> None:
    """Write a recipe and its prompts into configs/ of the current folder; nothing is overwritten."""
    written, command = write_recipe(recipe, Path())
    for path in written:
        typer.echo(f"wrote {path}")
    if not written:
        typer.echo("everything is there already")
    typer.echo(f"next: {command}")


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A YAML file; see configs/.")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Override one key: section.key=value.")] = None,
    resume: Annotated[bool, typer.Option(help="Continue the run from its newest checkpoint.")] = False,
) -> None:
    """Train a student, on this machine or on a Ray cluster."""
    resolved = load_config(config, overrides or [])
    from eopd.runtime.train import train as run
    from eopd.telemetry.console import print_summary

    summary, directory = run(resolved, resume=resume)
    print_summary(summary, directory.samples(), directory.path)
    if directory.report.exists():
        typer.echo(f"report: {directory.report}")
    if summary["status"] != "completed":
        raise typer.Exit(EXIT_INTERRUPTED)


@app.command()
def check(
    config: Annotated[Path, typer.Argument(help="A YAML file; see configs/.")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Override one key: section.key=value.")] = None,
    live: Annotated[bool, typer.Option("--live", help="Start the teachers too, and test what they answer.")] = False,
) -> None:
    """Check models, vocabularies, end tokens and prompts, and say what was found."""
    resolved = load_config(config, overrides or [])
    from eopd import preflight

    prepared = preflight.check(resolved)
    for line in preflight.report(resolved, prepared):
        typer.echo(line)
    if live:
        from eopd.runtime.check import check_live

        for report in check_live(resolved, prepared):
            typer.echo(report)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run directory, e.g. runs/NAME.")],
    step: Annotated[int | None, typer.Option(min=1, help="Of which checkpoint; else the newest.")] = None,
    output: Annotated[Path | None, typer.Option(help="Where to write; else RUN/hf-step-NNNNNN.")] = None,
) -> None:
    """Write the student of a checkpoint as a Hugging Face directory, here, without starting Ray."""
    from eopd.runtime.run_directory import RunDirectory

    directory = RunDirectory(run)
    config, checkpoint = directory.config(), directory.checkpoint(step)
    for message in directory.passed_over() if step is None else ():
        typer.echo(message, err=True)
    target = output or run / f"hf-{checkpoint.name}"
    adapter = [target.with_name(f"{target.name}-adapter")] if config.student.lora else []
    for written in (target, *adapter):
        if written.exists():
            raise ConfigError(f"--output {written}: exists; remove it or name another")
    if not target.parent.is_dir():
        raise ConfigError(f"--output {target}: there is no directory {target.parent}")
    from eopd.learner.export import export_checkpoint
    from eopd.preflight import require_model

    require_model("student.model", config.student.model, num_tokens=config.max_sequence_tokens)
    export_checkpoint(config.student, checkpoint / "learner", target)
    typer.echo(target)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories, e.g. runs/NAME; several are shown together.")],
    output: Annotated[Path | None, typer.Option(help="Else RUN/report.html, or ./report.html of several.")] = None,
) -> None:
    """Write what runs did, also one under way, into one HTML file that opens anywhere."""
    from eopd.telemetry.report.page import write_report

    target = output or (runs[0] if len(runs) == 1 else Path()) / "report.html"
    try:
        write_report(runs, target)
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}") from None
    typer.echo(target)


@app.command()
def scale(
    run: Annotated[Path, typer.Argument(help="The directory of a run that is running, e.g. runs/NAME.")],
    engines: Annotated[int, typer.Option(min=1, help="How many rollout engines it shall have.")],
) -> None:
    """Add rollout engines to a running job, or let some finish what they have and end."""
    from eopd.runtime.run_directory import RunDirectory

    RunDirectory(run).ask_for_engines(engines)
    typer.echo(f"asked for {engines} rollout engines; the job says when they are there (metric eopd_engines_up)")


@app.command()
def status(run: Annotated[Path, typer.Argument(help="A run directory, e.g. runs/NAME.")]) -> None:
    """Say how far a run is, whether it is running or has ended."""
    from eopd.runtime.run_directory import RunDirectory
    from eopd.telemetry.console import PACE_WINDOW, print_status

    directory = RunDirectory(run)
    settings = directory.config().run
    summary, rows = directory.read_summary(), directory.last_rows(PACE_WINDOW + 1)
    print_status(settings.name, summary, rows, batches=settings.batches)


@models.command("demo")
def demo_models(directory: Annotated[Path, typer.Argument()] = MODELS) -> None:
    """SmolLM2-135M-Instruct from a package of the Python package index, and its pruned 99 M student."""
    from eopd.models.smollm2 import write_student, write_teacher

    teacher = write_teacher(directory.expanduser() / "smollm2-135m")
    student = write_student(teacher, directory.expanduser() / "smollm2-99m-pruned")
    typer.echo(f"{teacher}\n{student}")


@models.command("tiny")
def tiny_models(
    directory: Annotated[Path, typer.Argument()] = MODELS / "tiny",
    family: Annotated[Literal["llama", "qwen3"], typer.Option()] = "qwen3",
) -> None:
    """A pair of models under one million parameters, made in seconds, for configs/tiny.yaml."""
    from eopd.models.tiny import write_tiny_pair

    teacher, student = write_tiny_pair(directory.expanduser(), family=family)
    typer.echo(f"{teacher}\n{student}")


def main() -> None:
    """The ``eopd`` command."""
    try:
        app()
    except ConfigError as error:
        rich.console.Console(stderr=True).print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except RunFailedError as error:
        rich.console.Console(stderr=True).print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
