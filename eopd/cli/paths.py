"""Paths that options name: what is wrong with one is a mistake of the user."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from eopd.config import ConfigError


def require_place(option: str, path: Path) -> None:
    """A file or directory can be made at a path, as far as its name and the directory around it say.

    Raises:
        ConfigError: begins with the option.
    """
    try:
        path.lstat()
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise ConfigError(f"{option} {path}: there is no directory {path.parent}") from None
    except OSError as error:
        raise ConfigError(f"{option} {path}: {error.strerror}") from None


@contextmanager
def about(path: Path) -> Iterator[None]:
    """A file that cannot be read or written is the mistake of who named ``path``."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{error.filename or path}: {error.strerror or error}") from None
