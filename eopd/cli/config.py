"""``eopd config``: a config as it is resolved, and what may stand in one."""

from pathlib import Path
from typing import Annotated, Final

import typer

import eopd
from eopd.cli.commands import SET_EPILOG, ConfigFile, Overrides
from eopd.config import dump_config
from eopd.config.annotated import annotate
from eopd.config.load import load_with_origins

_PACKAGE: Final = Path(eopd.__file__).parent
_SCHEMA: Final = _PACKAGE / "recipes" / "schema.json"  # that of configs/, which is linked there
_PAGE: Final = _PACKAGE / "reference.md"  # docs/configuration-reference.md, which is linked there

config = typer.Typer(no_args_is_help=True, help="Show a config resolved, and what may be in one.")


@config.command("show", epilog=SET_EPILOG)
def show(
    config: ConfigFile,
    overrides: Overrides = None,
    plain: Annotated[bool, typer.Option("--plain", help="Leave the origins out.")] = False,
) -> None:
    """Print a config with every default written out, and behind each value where it was written: a
    file and line, --set, default, or chosen with the reason.
    """
    loaded = load_with_origins(config, overrides or [])
    typer.echo(dump_config(loaded.config) if plain else annotate(loaded), nl=False)


@config.command("schema")
def schema() -> None:
    """Print the JSON schema of a config, for an editor."""
    typer.echo(_SCHEMA.read_text(encoding="utf-8"), nl=False)


@config.command("docs")
def docs() -> None:
    """Print the reference of all keys, as Markdown."""
    typer.echo(_PAGE.read_text(encoding="utf-8"), nl=False)
