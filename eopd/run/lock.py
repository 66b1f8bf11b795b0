"""One process at a time runs a run: it holds a lock in the run directory for as long as it lives.

The lock is ``flock`` on ``run.lock``, which the kernel releases when its holder ends, however that
ends. The file names the holder: host, process id, since when. A holder that ends in order empties
it.

On NFS, Linux turns ``flock`` into a lock of the server, which all hosts see unless the mount has
``nolock`` or ``local_lock``; Lustre needs the mount option ``flock``; some file systems have no
locks. Where the lock of another host may not be seen, ``held`` yields a note with the content of
the file.
"""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Final

from pydantic import Field, TypeAdapter

from eopd.config import ConfigError
from eopd.run.place import LOCK

_NO_LOCKS: Final = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})
_MOMENT_S: Final = 1.0  # a process that only looks at a lock holds it for less
_PAUSE_S: Final = 0.2
_SEEN_S: Final = 60.0  # NFS keeps for so long what it knows of a directory (acdirmax)


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A holder is the process that runs a run, or ran it last. ``since`` is in seconds since 1970."""

    host: str
    pid: int
    since: Annotated[float, Field(ge=0.0, le=1e11)]

    def __str__(self) -> str:
        started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host}, since {started}"


@contextmanager
def held(
    directory: Path,
    key: str = "run.name",
    *,
    wait_s: float = 0.0,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[list[str]]:
    """Holds the lock of a run directory, which is made where there is none, and removed if it stays
    empty.

    Args:
        directory: the run directory.
        key: what names the directory, for messages.
        wait_s: how long to wait for another process that holds it: where a scheduler repeats a
            command, the one before may still be writing its last checkpoint.
        say: is told what is waited for.

    Yields:
        Notes for people; none where the lock keeps other processes out for certain.

    Raises:
        ConfigError: another process holds it, which the message names; or the directory cannot be
            made.
    """
    path = directory / LOCK
    try:
        descriptor, notes = _take(path, key, wait_s, say)
    except OSError as error:
        raise ConfigError(f"run.directory: {directory} cannot be made ({error.strerror})") from None

    try:
        here = Holder(host=socket.gethostname(), pid=os.getpid(), since=time.time())
        before = last_holder(directory)
        if before is not None and before.host != here.host:
            notes.append(
                f"{path} names {before}, which did not leave in order. If it still runs (not "
                "every shared file system shows the locks of other hosts), stop one of the "
                "two"
            )

        try:
            _write(descriptor, json.dumps(asdict(here)))
        except OSError as error:
            raise ConfigError(
                f"run.directory: {path} cannot be written ({error.strerror})"
            ) from None

        yield notes
    finally:
        _write(descriptor, "")
        if directory.is_dir() and os.listdir(directory) == [LOCK]:  # nothing was begun
            path.unlink()
            with suppress(OSError):  # another process waits for it, and has made its file
                directory.rmdir()

        os.close(descriptor)


def holder(directory: Path) -> Holder | None:
    """Returns the process that runs a run now, or None. Without locks, it is the last one that has not
    ended in order.
    """
    path = directory / LOCK
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None

    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return last_holder(directory)
    else:
        return None
    finally:
        os.close(descriptor)


def last_holder(directory: Path) -> Holder | None:
    """Returns the process that ran a run last and did not end in order, or None."""
    try:
        return holder_in((directory / LOCK).read_bytes())
    except OSError:
        return None


def holder_in(content: bytes) -> Holder | None:
    """Returns the process that a lock's content names; None where it is empty, or not yet written."""
    try:
        return TypeAdapter(Holder).validate_json(content)
    except ValueError:
        return None


def require_same(directory: Path, expected: Holder) -> None:
    """Checks, on any machine, that a run directory is the one that the driver holds.

    A shared file system may show a new file late, so that this looks for ``_SEEN_S`` seconds.

    Args:
        directory: the run directory, as this machine sees it.
        expected: the driver, as its lock names it.

    Raises:
        ConfigError: the lock is not there, or names another process.
    """
    until = time.monotonic() + _SEEN_S
    while last_holder(directory) != expected:
        if time.monotonic() > until:
            raise ConfigError(
                f"run.directory: {directory} is not the same directory on {socket.gethostname()}, "
                f"where a learner rank writes its part of every checkpoint, as on {expected.host}, "
                "where the driver runs. Give an absolute path on a disk that every node mounts"
            )

        time.sleep(_PAUSE_S)


def _take(path: Path, key: str, wait_s: float, say: Callable[[str], None]) -> tuple[int, list[str]]:
    """Returns the descriptor that holds the lock, and notes on it."""
    began, has_said = time.monotonic(), False
    while (taken := _try(path)) is None:
        holder_is = last_holder(path.parent) or "another process"
        waited_s = time.monotonic() - began
        if waited_s > max(wait_s, _MOMENT_S):
            raise ConfigError(
                f"{key}: {path.parent} is being run by {holder_is}. Wait for it, stop it (Ctrl-C, "
                f"or SIGTERM to that process), or choose another {key}"
            )

        if waited_s > _MOMENT_S and not has_said:
            say(f"waiting for {holder_is} to end, for up to {wait_s:g} s (cluster.wait_s)")
            has_said = True

        time.sleep(_PAUSE_S)

    return taken


def _try(path: Path) -> tuple[int, list[str]] | None:
    """Returns what ``_take`` does, or None while another process holds the lock, or where its directory
    has gone with it.
    """
    notes = []
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except FileNotFoundError:
        return None

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            os.close(descriptor)
            raise

        notes = [
            f"the file system of {path.parent} has no locks: nothing keeps a second process out "
            "of this run"
        ]

    if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
        return descriptor, notes

    os.close(descriptor)  # its holder has just removed it: nothing was begun there
    return None


def _write(descriptor: int, text: str) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text.encode(), 0)
    os.fsync(descriptor)  # for other machines
