"""``eopd init`` writes a shipped recipe, the recipes it extends, its prompts and the schema for an
editor into the current folder.

The recipes are the files of ``configs/``, which the package carries as ``eopd/recipes``. They keep
their names and their place below ``configs/``, so that the paths inside a recipe, and the command
in its header, are right as they are.
"""

from pathlib import Path

import eopd
from eopd.config import ConfigError
from eopd.config.base import DATA_SUFFIXES
from eopd.config.chain import read_chain
from eopd.config.load import flatten, read_leaves

RECIPES = Path(eopd.__file__).with_name("recipes")
_FOLDER = "configs"
_SCHEMA = Path("schema.json")  # which the first line of a recipe names


def recipe_names() -> list[str]:
    """Returns the names of all recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def write_recipe(name: str, folder: Path) -> tuple[list[Path], str]:
    """Writes ``configs/NAME.yaml``, the recipes it extends, the prompts they name, and the schema
    below ``folder``.

    Files that are there already, with the same contents, are left alone.

    Returns:
        The files that were written, and the command that runs the recipe.

    Raises:
        ConfigError: there is no such recipe, a file with other contents is in the way (then nothing
            is written), or the folder cannot be written to.
    """
    if name not in (known := recipe_names()):
        raise ConfigError(f"init {name}: there is no such recipe; choose one of {', '.join(known)}")

    target = folder / _FOLDER
    missing = [path for path in _files(name) if not _is_there(target / path, RECIPES / path)]

    for path in missing:
        _copy(RECIPES / path, target / path)

    return [Path(_FOLDER) / path for path in missing], _command(RECIPES / f"{name}.yaml")


def data_to_make(name: str, folder: Path) -> list[str]:
    """Returns the files of rows that a recipe names and that are not below ``folder``: no recipe
    brings rows that are the user's own.
    """
    values = map(str, read_leaves(RECIPES / f"{name}.yaml").values())
    files = dict.fromkeys(value for value in values if value.endswith(DATA_SUFFIXES))
    return [file for file in files if not (folder / file).exists()]


def _files(name: str) -> list[Path]:
    """Returns the paths of a recipe, of those it extends, their prompts and the schema below
    ``configs/``.
    """
    chain = read_chain(RECIPES / f"{name}.yaml")
    recipes = [file.path.relative_to(RECIPES) for file in reversed(chain)]
    values = (value for file in chain for value in flatten(file.tree).values())
    specs = dict.fromkeys(str(value) for value in values if str(value).startswith(f"{_FOLDER}/"))
    return [*recipes, *(Path(spec).relative_to(_FOLDER) for spec in specs), _SCHEMA]


def _command(recipe: Path) -> str:
    """Returns the line of the header that runs the recipe."""
    text = recipe.read_text(encoding="utf-8")
    lines = (line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    return next(line for line in lines if "eopd train" in line)


def _is_there(target: Path, source: Path) -> bool:
    if not target.exists():
        return False

    if not target.is_file() or target.read_bytes() != source.read_bytes():
        raise ConfigError(
            f"{target}: exists and differs from the recipe's; rename it, or go to another folder"
        )

    return True


def _copy(source: Path, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as file:  # never over a file that has just appeared
            file.write(source.read_bytes())
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written ({error.strerror})") from None
