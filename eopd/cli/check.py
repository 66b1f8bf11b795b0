"""``eopd check`` looks for mistakes before anything starts."""

import os
from typing import Annotated

import typer

from eopd.cli.commands import ConfigFile, Overrides
from eopd.config import Config, ConfigError, load_config

_Live = Annotated[
    bool, typer.Option("--live", help="Start the teachers too, and test what they answer.")
]
_Offline = Annotated[
    bool,
    typer.Option(
        "--offline",
        help="Check what needs neither a network nor weights, and say what is not here.",
    ),
]


def check(
    config: ConfigFile, overrides: Overrides = None, live: _Live = False, offline: _Offline = False
) -> None:
    """Check models, vocabularies, end tokens and prompts, and say what was found."""
    if live and offline:
        raise ConfigError(
            "--live: starts the teachers, which --offline does without; leave one out"
        )

    resolved = load_config(config, overrides or [])
    if offline:
        _check_offline(resolved)
    else:
        _check(resolved, live=live)


def _check_offline(config: Config) -> None:
    from eopd import preflight
    from eopd.runtime.placement import summarize

    for line in preflight.check_offline(config):
        typer.echo(line)

    typer.echo(summarize(config))
    typer.echo("no mistake was found in what is here")


def _check(config: Config, *, live: bool) -> None:
    from eopd import preflight
    from eopd.preflight.disk import require_disk

    resolved = preflight.pinned(config)
    prepared = preflight.prepare(resolved)
    require_disk(resolved)
    for line in preflight.describe(resolved, prepared):
        typer.echo(line)

    from eopd.preflight.environment import gpus_here, is_local
    from eopd.runtime.placement import room_here

    here = is_local(resolved.cluster)
    if here and (lack := room_here(resolved, cpus=os.cpu_count() or 1, gpus=gpus_here())):
        typer.echo(f"note: there is no room for it on this machine: {lack}")

    if live:
        from eopd.runtime.check import check_live

        for report in check_live(resolved, prepared):
            typer.echo(report)

    typer.echo("no mistake was found")
