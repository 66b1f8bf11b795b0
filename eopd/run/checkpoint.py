"""One directory is one resumable run: what a checkpoint holds, written whole or not at all, and
known to be whole.

    runs/<name>/checkpoints/step-000050/
        learner/        what the learner ranks write: weights, optimiser, schedule, random state
        state.json      what the driver knows: completed batches, ledger, totals
        manifest.json   every file above with its size, and a digest of the small ones; written last
A checkpoint is written beside its place, forced to disk, and renamed when complete. What happens to it later (a copy
that broke off, a disk that was full, a file cut short) shows in its manifest: whoever asks for checkpoints gets those
whose manifest holds.

Left out: digests of files above ``DIGEST_BYTES``. A 7B student's checkpoint has some hundred
gigabytes; reading all of them again at every save and every resume would hold up training for
minutes, to notice what sizes already show. A big file that keeps its size and changes its bytes is
the storage's to find.

Files written by ranks on other nodes reach the driver through the shared file system; forcing them
to disk from here is then as good as that file system makes it.
"""

import asyncio
import hashlib
import json
import os
import shutil
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from pydantic import TypeAdapter

from eopd.config.saved import read_saved
from eopd.types import RunFailedError

STATE = "state.json"
MANIFEST = "manifest.json"
DIGEST_BYTES = 1 << 20
WITHOUT_IT = "Go on from an older checkpoint (--resume --step N), or begin another run (run.name)"


class StorageError(RunFailedError):
    """The disk did not take what a run cannot go on without: says what, how much room there
    was, and what to do.
    """

    @classmethod
    def of(cls, path: Path, error: OSError, what_is_left: str) -> Self:
        """``path`` could not be written; call it before anything is removed, so that it sees
        the disk as it was.
        """
        # an actor's error is wrapped, and says its traceback
        cause: object = getattr(error, "cause", error)
        free = f"{_free_bytes(path):,} bytes were free there"
        return cls(f"{path} could not be written: {cause}; {free}. {what_is_left}")


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverState:
    """The driver's part of a checkpoint. ``inputs`` are digests of what the config's paths stood
    for, by key; None in checkpoints of before they were kept.
    """

    step: int
    tokens: int
    trajectories: int
    skipped_steps: int
    wall_s: float
    ledger: Mapping[str, object]
    inputs: Mapping[str, str] | None = None

    @classmethod
    def read(cls, checkpoint: Path) -> Self:
        """Read back what ``write_checkpoint`` wrote.

        Raises:
            ConfigError: something of it is missing.
        """
        return read_saved(checkpoint / STATE, TypeAdapter(cls), WITHOUT_IT)


async def write_checkpoint(
    root: Path, state: DriverState, save: Callable[[Path], Awaitable[None]], *, keep_last: int
) -> Path:
    """Write ``root/step-NNNNNN``; ``save`` writes the learner's part.

    Afterwards the newest ``keep_last`` whole ones are left, this one among them, and none before
    those.

    Raises:
        StorageError: the disk did not take it. Nothing of it is left, and the checkpoints before it
            are as they were.
    """
    final = root / f"step-{state.step:06d}"
    partial = root / f".{final.name}.partial"
    remove_partial(root)

    try:
        partial.mkdir(parents=True)
        await save(partial / "learner")
        (partial / STATE).write_text(json.dumps(asdict(state)), encoding="utf-8")
        # gigabytes on their way to a disk: generation goes on meanwhile
        await asyncio.to_thread(seal, partial)
        # one of this step is a broken one: training went back before it
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _force(root)
    except BaseException as error:
        told = (
            StorageError.of(final, error, _what_is_left(root))
            if isinstance(error, OSError)
            else None
        )
        shutil.rmtree(partial, ignore_errors=True)
        if told is not None:
            raise told from error

        raise

    kept = {*list_checkpoints(root)[-keep_last:], final}

    for old in _named(root):
        if step_of(old) < min(map(step_of, kept)):
            # one that stays is seen again after the next step that is saved
            shutil.rmtree(old, ignore_errors=True)

    return final


def seal(directory: Path) -> None:
    """Force every file to disk, then write and force the manifest, then the directories that
    name them.
    """
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    for path in files:
        _force(path)

    entries = {str(path.relative_to(directory)): _entry(path) for path in files}
    (directory / MANIFEST).write_text(json.dumps({"files": entries}, indent=1), encoding="utf-8")
    _force(directory / MANIFEST)
    for path in (*(path for path in directory.rglob("*") if path.is_dir()), directory):
        _force(path)


def list_checkpoints(root: Path) -> list[Path]:
    """Those that are whole, oldest first."""
    return [path for path in _named(root) if fault(path) is None]


def broken_checkpoints(root: Path) -> dict[Path, str]:
    """Those that are not whole, oldest first, each with what is wrong."""
    return {path: why for path in _named(root) if (why := fault(path))}


def fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint: the first difference to its manifest."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_bytes())["files"]
        faults = (_fault_of(checkpoint / name, name, entry) for name, entry in files.items())
        return next((found for found in faults if found), None)
    except OSError as error:
        return f"{MANIFEST} cannot be read ({error.strerror})"
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} is not what was written"


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step-"))


def remove_partial(root: Path) -> None:
    """Remove what a driver that was killed while it saved left behind."""
    for path in root.glob(".step-*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def remove_checkpoints(root: Path) -> None:
    """Remove every checkpoint, and their directory where nothing else is in it."""
    remove_partial(root)
    for path in _named(root):
        shutil.rmtree(path)

    with suppress(OSError):  # it is not there, or not empty
        root.rmdir()


def write_whole(path: Path, text: str) -> None:
    """Replace a small file, whole or not at all, on disk when this returns.

    Raises:
        StorageError: the disk did not take it; the file is as it was.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        _force(partial)
        partial.rename(path)
        _force(path.parent)
    except OSError as error:
        told = StorageError.of(
            path, error, "Free some space, then continue the run with --resume auto."
        )
        partial.unlink(missing_ok=True)
        raise told from error


def _named(root: Path) -> list[Path]:
    return sorted(
        (
            path
            for path in root.glob("step-*")
            if path.name.removeprefix("step-").isdecimal() and path.name.isascii()
        ),
        key=step_of,
    )


def _entry(path: Path) -> dict[str, object]:
    size = path.stat().st_size
    return {"bytes": size} | ({"sha256": _sha256(path)} if size <= DIGEST_BYTES else {})


def _fault_of(path: Path, name: str, entry: Mapping[str, object]) -> str | None:
    if not path.is_file():
        return f"{name} is missing"

    if (size := path.stat().st_size) != entry["bytes"]:
        return f"{name} has {size} bytes instead of {entry['bytes']}"

    if "sha256" in entry and _sha256(path) != entry["sha256"]:
        return f"{name} has other bytes than were written"

    return None


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _force(path: Path) -> None:
    """Fsync a file or a directory, whoever wrote it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _free_bytes(path: Path) -> int:
    there = next(parent for parent in path.absolute().parents if parent.exists())
    return shutil.disk_usage(there).free


def _what_is_left(root: Path) -> str:
    whole = list_checkpoints(root)
    if not whole:
        return (
            "There is no older checkpoint. Free some space or name another run.directory; "
            "start with --resume auto."
        )

    return (
        f"{whole[-1].name} is whole and kept. Free some space (or lower "
        "checkpoint.keep_last), then continue from it with --resume."
    )
