"""Commands of the program as lines for the shell, and what several of them share."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final

import typer

EXIT_FAILED: Final = 1
EXIT_MISTAKEN: Final = 2  # by a mistake of the user
EXIT_INTERRUPTED: Final = 130

JobServer = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="The job server of a Ray cluster, e.g. http://HEAD:8265: the run is a job there, and "
        "RUN its id.",
    ),
]


def train_command(
    config: Path | str, overrides: Sequence[str], options: Sequence[str], verb: str = "train"
) -> str:
    """Returns ``eopd train``, or another verb with the same options, as a line for the shell."""
    settings = [part for override in overrides for part in ("--set", override)]
    return shlex.join(["eopd", verb, str(config), *settings, *options])
