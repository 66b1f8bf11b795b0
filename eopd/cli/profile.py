"""``eopd profile`` says where the time of a step goes, and what to change."""

import json
from typing import Annotated

import typer

from eopd.cli.commands import ConfigFile, Overrides
from eopd.config import load_config

_Steps = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Steps that are measured, after the warm-up.",
        show_default="5, or fewer where they take long",
    ),
]
_Json = Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")]


def profile(
    config: ConfigFile, overrides: Overrides = None, steps: _Steps = None, as_json: _Json = False
) -> None:
    """Train a few steps, keep nothing of them, and say where their time goes: each stage alone and
    in the run, who waits for whom, what the machine could do, and what to change.
    """
    resolved = load_config(config, overrides or [])
    from eopd.runtime.profile import profile as run
    from eopd.telemetry.profile import as_record, print_profile

    profiled = run(resolved, steps=steps, say=lambda text: typer.echo(text, err=True))
    if as_json:
        typer.echo(json.dumps(as_record(profiled, resolved), allow_nan=False))
    else:
        print_profile(profiled, resolved)
