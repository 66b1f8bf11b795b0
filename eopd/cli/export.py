"""``eopd export``: the student of a checkpoint as a Hugging Face directory."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eopd.cli.commands import Overrides, RunPath
from eopd.cli.models import hush
from eopd.cli.paths import blame_user, require_place
from eopd.config import Config, ConfigError
from eopd.config.load import change_config

if TYPE_CHECKING:
    from eopd.run.directory import RunDirectory


def export(
    run: RunPath,
    step: Annotated[
        int | None, typer.Option(min=1, help="Of which checkpoint; else the newest.")
    ] = None,
    best: Annotated[
        bool, typer.Option("--best", help="Of the checkpoint that checkpoint.keep_best finds best.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="Where to write; else RUN/hf-step-NNNNNN.")
    ] = None,
    overrides: Overrides = None,
    push: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME", help="Upload it to the Hugging Face Hub too, with a model card."
        ),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="With --push: a new repository is not private.")
    ] = False,
) -> None:
    """Write the student of a checkpoint as a Hugging Face directory, here, without starting Ray."""
    if public and push is None:
        raise ConfigError("--public: goes with --push")

    hush()
    from eopd.run.directory import RunDirectory

    directory = RunDirectory(run)
    config, checkpoint = _trained(directory, step, overrides or [], best=best)
    target = output or run / f"hf-{checkpoint.name}"
    _require_free(target, with_adapter=config.student.lora is not None)

    from eopd.hub import model_directory
    from eopd.learner.export import export_checkpoint
    from eopd.preflight import require_model

    student = model_directory(config.student.model, weights=True)
    require_model("student.model", student, num_tokens=config.max_sequence_tokens)
    if push is not None:
        from eopd.hub.push import require_repository

        typer.echo(require_repository(push, public=public), err=True)

    try:
        with blame_user(target):
            export_checkpoint(config.student, checkpoint / "learner", target, _note)
    except (ConfigError, ValueError):
        if checkpoint.exists():
            raise

        raise ConfigError(
            f"{checkpoint} was removed meanwhile by its run; name a newer one: --step"
        ) from None

    typer.echo(target)
    if push is not None:
        typer.echo(_push(directory, checkpoint, target, push))


def _note(text: str) -> None:
    typer.echo(f"note: {text}", err=True)


def _trained(
    directory: "RunDirectory", step: int | None, overrides: Sequence[str], *, best: bool
) -> tuple[Config, Path]:
    """Returns the checkpoint that is meant, and the config that goes with it; says which newer ones
    are passed over.
    """
    from eopd.run.checkpoint import step_of

    change_config(directory.config(), overrides)  # a mistake in them comes first
    if best and step is not None:
        raise ConfigError(f"--best, --step {step}: only one can say which checkpoint it is")

    if best:
        step = directory.best_step()

    checkpoint = directory.checkpoint(step)
    for message in directory.passed_over() if step is None else ():
        typer.echo(message, err=True)

    config = directory.config_of_student(step_of(checkpoint))
    return change_config(config, overrides), checkpoint


def _require_free(target: Path, *, with_adapter: bool) -> None:
    """Checks that the directories that are written do not exist, and can be made."""
    adapter = [target.with_name(f"{target.name}-adapter")] if with_adapter else []
    for written in (target, *adapter):
        if os.path.lexists(written):
            raise ConfigError(f"--output {written}: exists; remove it or name another")

        require_place("--output", written)


def _push(run: "RunDirectory", checkpoint: Path, exported: Path, repository: str) -> str:
    """Uploads an exported student with its model card; returns where it is."""
    from eopd.hub.push import push
    from eopd.run.card import model_card
    from eopd.run.checkpoint import step_of
    from eopd.run.evaluations import read_evaluations

    step = step_of(checkpoint)
    measured = read_evaluations(run.evaluations)
    card = model_card(run.config_at(step), measured, step, repository.rpartition("/")[2])
    with blame_user(exported):
        (exported / "README.md").write_text(card, encoding="utf-8")

    return push(exported, repository, f"Student of step {step}")
