"""A config file may extend another one, and that one a third: the files of such a chain are read.

In: the path of a config. Out: its files, of which each lies over those before it. A file is
named in ``extends`` by its path from the folder of the file that says so. Top-level keys that begin
with ``x-`` hold anchors of their own file, and are left out, as ``extends`` itself is.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from eopd.config.document import DocumentError, Lines, read_document, show
from eopd.config.errors import ConfigError
from eopd.config.scalars import NULLS, Plain

EXTENDS: Final = "extends"
_HOLDER: Final = "x-"  # begins the name of a top-level key that only holds anchors


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigFile:
    """A file of a chain: the settings in it, and the line of each by its place."""

    path: Path
    tree: dict[str, object]
    lines: Lines


def read_chain(path: Path) -> list[ConfigFile]:
    """Reads a config file and all that it extends; the file at ``path`` is the last.

    Raises:
        ConfigError: a file is missing or no YAML mapping, ``extends`` is no path, or the chain leads
            back to one of its files. The message begins with the file, and ends with the chain.
    """
    chain: list[Path] = []
    files: list[ConfigFile] = []
    following: Path | None = path

    while following is not None:
        is_loop = os.path.realpath(following) in map(os.path.realpath, chain)
        chain.append(following)
        if is_loop:
            raise ConfigError(f"{chain[-2]}: extends: leads back to {following}{_told(chain)}")

        tree, lines = _read(chain)
        parent = _parent(tree, chain)
        settings = {key: value for key, value in tree.items() if not key.startswith(_HOLDER)}
        files.append(ConfigFile(path=following, tree=settings, lines=lines))
        following = parent

    return files[::-1]


def _read(chain: Sequence[Path]) -> tuple[dict[str, object], Lines]:
    """Reads the last file of a chain."""
    path, end = chain[-1], _told(chain)
    try:
        tree, lines = read_document(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}){end}") from None
    except UnicodeDecodeError as error:
        fault = f"byte {error.start + 1} is no UTF-8; save it as UTF-8 text"
        raise ConfigError(f"{path}: is not YAML: {fault}{end}") from None
    except DocumentError as error:
        raise ConfigError(f"{path}: {error}{end}") from None

    if not isinstance(tree, dict):
        contents = "is empty" if tree is None else f"is {show(tree)}"
        raise ConfigError(f"{path}: must be a mapping of sections ({contents}){end}")

    return tree, lines


def _parent(tree: dict[str, object], chain: Sequence[Path]) -> Path | None:
    """Takes ``extends`` out of the tree of the last file; returns the file that it names."""
    if EXTENDS not in tree:
        return None

    name = tree.pop(EXTENDS)
    is_null = isinstance(name, Plain) and name in NULLS
    if not isinstance(name, str) or not name or is_null or "\0" in name:
        raise ConfigError(
            f"{chain[-1]}: extends: must be the path of one file, from the folder of this one "
            f"(is {show(name)}){_told(chain)}"
        )

    return chain[-1].parent / os.path.expanduser(name)


def _told(chain: Sequence[Path]) -> str:
    """Returns the end of a message that names the chain, if there is more than one file."""
    return f" (chain: {' -> '.join(map(str, chain))})" if len(chain) > 1 else ""
