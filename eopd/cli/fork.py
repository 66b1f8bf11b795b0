"""``eopd fork`` goes on from a checkpoint of a run under other settings, as a new run."""

from pathlib import Path
from typing import Annotated

import typer

_Run = Annotated[Path, typer.Argument(help="The run to go on from, e.g. runs/NAME; it stays.")]
_Name = Annotated[str, typer.Option(help="The name of the new run, which lies beside the other.")]
_Step = Annotated[
    int | None, typer.Option(min=1, help="From the checkpoint of this step; else the newest.")
]
_Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="What the new run changes; may be given more than once. What --resume may not "
        "change, a fork may not either.",
    ),
]
_Fresh = Annotated[
    bool,
    typer.Option("--fresh-optimizer", help="Begin with moments of zero; else they are kept."),
]


def fork(
    run: _Run,
    name: _Name,
    step: _Step = None,
    overrides: _Overrides = None,
    fresh_optimizer: _Fresh = False,
) -> None:
    """Go on from a checkpoint of a run under other settings, as a new run with its own directory.

    The run it comes from is only read, and may be running.
    """
    from eopd.cli.main import train  # main.py knows every command, this one too
    from eopd.run.parent import read_parent
    from eopd.runtime.fork import fork as prepare_fork

    directory = prepare_fork(
        run, name=name, step=step, overrides=overrides or [], fresh_optimizer=fresh_optimizer
    )
    parent = read_parent(directory.path)
    assert parent is not None
    optimizer = "fresh" if parent.fresh_optimizer else "kept"
    typer.echo(
        f"{directory.path} goes on from step {parent.step} of {parent.name}; optimiser {optimizer}"
    )
    train(directory.path / "config.yaml", resume="auto")
