"""The base of every config section."""

from collections.abc import Collection
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

NativeOptions = dict[str, object]

# Absolute from here on: actors may run in another working directory. ``~`` is the home directory.
DATA_SUFFIXES = (".jsonl", ".parquet")
AbsolutePath = Annotated[Path, AfterValidator(lambda path: path.expanduser().absolute())]


# A file becomes absolute like any path; anything else is the name of a data set.
def _resolve_file(spec: str) -> str:
    path = Path(spec)
    return str(path.expanduser().absolute()) if path.suffix in DATA_SUFFIXES else spec


DataSpec = Annotated[str, AfterValidator(_resolve_file)]


def refuse(where: str, options: NativeOptions, owned: Collection[str]) -> None:
    """Refuse native options that this project must set itself, since its numbers rest on them.

    Raises:
        ValueError: names them.
    """
    if taken := sorted(options.keys() & set(owned)):
        raise ValueError(f"{where}: {', '.join(taken)} cannot be set here: other keys, or the method, decide")


class Section(BaseModel):
    """Frozen; an unknown key is an error, never ignored; defaults are checked like values."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)
