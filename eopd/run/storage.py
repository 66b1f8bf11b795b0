"""The files of a run reach the disk whole or not at all; where one does not, the error says what to do."""

import errno
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, Self

from eopd.run.record import append_jsonl
from eopd.types import RunFailedError

_ADVICE: Final = "Then continue with --resume auto."
_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CLOSED: Final = (errno.EACCES, errno.EPERM, errno.EROFS)


class StorageError(RunFailedError):
    """A file that the run cannot do without could not be written. The message has the file, the free
    space, and what to do.
    """

    @classmethod
    def of(cls, path: Path, error: OSError, advice: str) -> Self:
        """Returns the error for ``path``; to be called before anything is removed, since it has the
        free space.
        """
        # the message of an actor's error has a traceback, that of its cause has none
        cause: object = getattr(error, "cause", error)
        number = getattr(cause, "errno", error.errno)
        known = free_bytes(path)
        free = "an unknown number of" if known == math.inf else f"{known:,}"
        if number in _CLOSED:
            remedy = "look at who may write there."
        elif number in _FULL:
            remedy = f"{free} bytes were free there: free some space."
        else:
            remedy = f"look at that disk; {free} bytes were free there."

        return cls(f"{path} could not be written: {cause}; {remedy} {advice}")


def write_whole(path: Path, text: str | Iterable[str]) -> None:
    """Replaces a file, whole or not at all; it is on disk when this returns. The text may come in
    pieces, for which the old file may still be read.

    Raises:
        StorageError: it could not be written; the file is as it was.
    """
    with storage_errors(path), replaced(path) as partial, storage_errors(path):
        with partial.open("w", encoding="utf-8") as file:
            file.writelines([text] if isinstance(text, str) else text)

        force(partial)


def append_kept(path: Path, record: Mapping[str, object]) -> None:
    """Appends a line that the run cannot do without (``record.append_jsonl``).

    Raises:
        StorageError: the disk did not take it.
    """
    with storage_errors(path):
        append_jsonl(path, record)


def force_kept(path: Path) -> None:
    """Forces to disk what was appended to a file, if there is one.

    Raises:
        StorageError: the disk did not take it.
    """
    with storage_errors(path):
        if path.exists():
            force(path)


@contextmanager
def storage_errors(path: Path, advice: Callable[[], str] = lambda: _ADVICE) -> Iterator[None]:
    """Raises an ``OSError`` of the block as a ``StorageError`` about ``path``. Around ``replaced`` this
    is for the renaming; inside of it, the free space is that before anything is removed.
    """
    try:
        yield
    except OSError as error:
        raise StorageError.of(path, error, advice()) from error


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yields where to make a file or a directory, which replaces the one at ``path`` at the end of the
    block; where the block raises, the old one stays.
    """
    partial = path.with_name(f".{path.name}.partial")
    _remove(partial)
    try:
        yield partial
        shutil.rmtree(path, ignore_errors=True)  # a file is replaced by the renaming
        partial.rename(path)
        force(path.parent)
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        path.unlink()


def force(path: Path) -> None:
    """Forces a file or a directory to disk, also one that another process wrote."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_bytes(path: Path) -> float:
    """Returns the bytes that are free where a path belongs; infinity where its disk does not say."""
    try:
        there = next(each for each in (path, *path.absolute().parents) if each.exists())
        usage = shutil.disk_usage(there)
    except OSError:
        return math.inf

    return usage.free if usage.total else math.inf
