"""``eopd config``: a config as it is resolved, and what may stand in one."""

from pathlib import Path
from typing import Annotated, Final

import typer

import eopd
from eopd.config import dump_config
from eopd.config.annotated import annotate
from eopd.config.load import load_with_origins

CONFIG_HELP: Final = (
    "A YAML file, e.g. configs/tiny.yaml; docs/configuration-reference.md describes its keys."
)
SET_HELP: Final = "Override one key; may be given more than once. See the end of this help."
SET_EPILOG: Final = (
    "--set takes section.key=value; the value is YAML, and an item of a list is named by "
    "its number: --set learner.lr=1e-5 --set loss.gate=always --set "
    "teachers.0.temperature=0.7 --set 'rollout.vllm={max_num_seqs: 64}'. Every key is "
    "described in docs/configuration-reference.md (`eopd config docs` prints it); `eopd config show "
    "CONFIG` prints them all with their values."
)

_PACKAGE: Final = Path(eopd.__file__).parent
_SCHEMA: Final = _PACKAGE / "recipes" / "schema.json"  # that of configs/, which is linked there
_PAGE: Final = _PACKAGE / "reference.md"  # docs/configuration-reference.md, which is linked there

Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help=SET_HELP)]

config = typer.Typer(no_args_is_help=True, help="Show a config resolved, and what may be in one.")


@config.command("show", epilog=SET_EPILOG)
def show(
    config: Annotated[Path, typer.Argument(help=CONFIG_HELP)],
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
