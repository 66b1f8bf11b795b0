"""``eopd list`` prints the runs of a directory."""

from pathlib import Path
from typing import Annotated

import typer

from eopd.config import ConfigError


def list_runs(
    directory: Annotated[
        Path, typer.Argument(help="Where run directories lie (run.directory of their configs).")
    ] = Path("runs"),
) -> None:
    """List the runs of a directory: status, step, newest held-out reverse KL, and when each last
    changed.
    """
    from eopd.telemetry.listing import print_runs, runs_in

    runs = runs_in(directory)
    if not runs:
        raise ConfigError(f"{directory} holds no runs; name the directory in which they lie")

    print_runs(runs)
