"""JSON that an earlier process wrote, read back: it may be of another version of eopd, or
damaged since.
"""

import os
import typing
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from eopd.config.errors import ConfigError

SavedT = typing.TypeVar("SavedT")


def require_directory(run: Path) -> None:
    """Requires that what is to be read as a run is a directory that can be looked into, or is not
    there.

    Raises:
        ConfigError: it is a file, closed, or no possible name.
    """
    try:
        os.listdir(run)
    except FileNotFoundError:
        return  # whoever reads it says that there is none
    except OSError as error:
        raise ConfigError(f"{run} is no run directory ({error.strerror})") from None


def read_saved(path: Path, kind: TypeAdapter[SavedT], way_out: str) -> SavedT:
    """Reads the value that a file holds; keys that its type does not have are left out.

    Raises:
        ConfigError: it cannot be read, or lacks something; says what, and ends with ``way_out``.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}). {way_out}") from None

    return parse_saved(str(path), text, kind, way_out)


def parse_saved(place: str, text: str | bytes, kind: TypeAdapter[SavedT], way_out: str) -> SavedT:
    """Reads the value that a text holds, as ``read_saved`` does; the text stands at ``place``."""
    try:
        return kind.validate_json(text)
    except ValidationError as error:
        fault = _fault(error.errors(include_url=False)[0])
        raise ConfigError(
            f"{place}: {fault}; it was damaged, or written by another version of eopd. {way_out}"
        ) from None


def _fault(detail: ErrorDetails) -> str:
    key = ".".join(map(str, detail["loc"]))
    if detail["type"] == "missing":
        return f"lacks {key}"

    return f"{key} is not what was written" if key else "is not what was written"
