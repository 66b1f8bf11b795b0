"""Paths of options are checked: a wrong one is a mistake of the user."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from eopd.config import ConfigError
from eopd.run.storage import StorageError


def require_place(option: str, path: Path) -> None:
    """Checks that a file or directory can be made at a path, by its name and the directory around it.

    Raises:
        ConfigError: it cannot; the message begins with the option.
    """
    try:
        path.lstat()
    except FileNotFoundError:
        _require_directory_of(option, path)
    except OSError as error:
        raise ConfigError(f"{option} {path}: {error.strerror}") from None


def require_file(option: str, path: Path) -> None:
    """Checks that a file can be written at a path; leaves nothing there.

    Raises:
        ConfigError: it cannot; the message begins with the option.
    """
    try:
        _require_directory_of(option, path)
        is_new = not path.exists()
        path.open("a").close()
        if is_new:
            path.unlink()
    except OSError as error:
        raise ConfigError(
            f"{option} {path}: cannot be written ({error.strerror}); name a file"
        ) from None


@contextmanager
def blame_user(path: Path) -> Iterator[None]:
    """Raises errors of files in the block as a ``ConfigError``, since the user named ``path``."""
    try:
        yield
    except (OSError, StorageError) as failure:
        error = failure if isinstance(failure, OSError) else failure.__cause__
        if not isinstance(error, OSError):
            raise

        raise ConfigError(f"{error.filename or path}: {error.strerror or error}") from None


def _require_directory_of(option: str, path: Path) -> None:
    if not path.parent.is_dir():
        raise ConfigError(f"{option} {path}: there is no directory {path.parent}") from None
