"""A checkpoint is written whole or not at all, and can be seen to be whole.

    runs/<name>/checkpoints/step-000050/
        learner/        written by the learner ranks: weights, optimiser, schedule, random state
        state.json      written by the driver: completed batches, ledger, totals
        manifest.json   every file above with its size, and a digest of the small ones; written last

It is written under another name, forced to disk, and renamed when it is complete. Later damage (a
copy that broke off, a file cut short) shows in the manifest: ``list_checkpoints`` returns only
checkpoints whose manifest is right.

Left out: digests of files above ``DIGEST_BYTES``. A 7B student's checkpoint has some hundred
gigabytes; to read all of them again at every save and every resume would hold up training for
minutes, to notice what sizes already show. A big file that keeps its size and changes its bytes is
left to the storage.

Files of ranks on other nodes reach the driver through the shared file system. To force them to disk
from here is as good as that file system makes it.
"""

import asyncio
import hashlib
import json
import os
import re
import shutil
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Self

from pydantic import TypeAdapter

from eopd.config.saved import read_saved
from eopd.run.storage import force, replaced, storage_errors

STATE = "state.json"
MANIFEST = "manifest.json"
DIGEST_BYTES = 1 << 20
WITHOUT_IT = "Go on from an older checkpoint (--resume --step N), or begin another run (run.name)"


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverState:
    """The driver's state is its part of a checkpoint. ``inputs`` are digests of what the config's
    paths held, by key; None in checkpoints of older versions.
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
        """Reads what ``write_checkpoint`` wrote.

        Raises:
            ConfigError: something of it is missing.
        """
        return read_saved(checkpoint / STATE, TypeAdapter(cls), WITHOUT_IT)


async def write_checkpoint(
    root: Path,
    state: DriverState,
    save: Callable[[Path], Awaitable[None]],
    *,
    keep_last: int,
    keep: Callable[[], Collection[int]] = tuple,
) -> Path:
    """Writes ``root/step-NNNNNN``; ``save`` writes the learner's part.

    Afterwards the newest ``keep_last`` whole checkpoints are left, this one among them, and before
    those the ones of the steps that ``keep`` returns then.

    Raises:
        StorageError: it could not be written. It is removed, and the checkpoints before it are as
            they were.
    """
    # one of this step that is there already is broken: training went back before it
    final = root / f"step-{state.step:06d}"
    advice = partial(_advice, root)
    remove_partial(root)
    with storage_errors(final, advice), replaced(final) as made, storage_errors(final, advice):
        made.mkdir(parents=True)
        await save(made / "learner")
        (made / STATE).write_text(json.dumps(asdict(state)), encoding="utf-8")
        # generation continues while gigabytes are written to disk
        await asyncio.to_thread(write_manifest, made)

    remove_old(root, keep_last, {*keep(), state.step})
    return final


def remove_old(root: Path, keep_last: int, keep: Collection[int]) -> None:
    """Removes what is older than the newest ``keep_last`` whole checkpoints, but for those of the
    steps ``keep``.
    """
    newest = [step_of(path) for path in list_checkpoints(root)[-keep_last:]]
    for old in _named(root):
        if newest and step_of(old) < min(newest) and step_of(old) not in keep:
            # one that cannot be removed is tried again at the next save
            shutil.rmtree(old, ignore_errors=True)


def link_checkpoint(checkpoint: Path, root: Path) -> Path:
    """Makes a checkpoint a part of another run too: by hard links, which need no space and outlive
    the original, or by copies where the file system has none across.

    Returns:
        The checkpoint in ``root``, which is whole.

    Raises:
        FileNotFoundError: the original was removed meanwhile.
        OSError: it could not be written.
    """
    final = root / checkpoint.name
    with replaced(final) as made:
        try:
            shutil.copytree(checkpoint, made, copy_function=_link)
        except OSError:
            _require_whole(checkpoint)
            raise

        _require_whole(made)
        _force_directories(made)

    return final


def write_manifest(directory: Path) -> None:
    """Forces every file to disk, then writes and forces the manifest, then forces the directories that
    name them.
    """
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    for path in files:
        force(path)

    entries = {str(path.relative_to(directory)): _entry(path) for path in files}
    (directory / MANIFEST).write_text(json.dumps({"files": entries}, indent=1), encoding="utf-8")
    force(directory / MANIFEST)
    _force_directories(directory)


def list_checkpoints(root: Path) -> list[Path]:
    """Returns the whole checkpoints, oldest first."""
    return [path for path in _named(root) if fault(path) is None]


def broken_checkpoints(root: Path) -> dict[Path, str]:
    """Returns the checkpoints that are not whole, oldest first, each with what is wrong."""
    return {path: why for path in _named(root) if (why := fault(path))}


def fault(checkpoint: Path) -> str | None:
    """Returns what is wrong with a checkpoint, the first difference to its manifest, or None."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_bytes())["files"]
        faults = (_fault_of(checkpoint / name, name, entry) for name, entry in files.items())
        return next(filter(None, faults), None)
    except OSError as error:
        return f"{MANIFEST} cannot be read ({error.strerror})"
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} is not what was written"


def size_of(checkpoint: Path) -> int:
    """Returns the bytes of a whole checkpoint's files, but for the manifest."""
    files = json.loads((checkpoint / MANIFEST).read_bytes())["files"]
    return sum(entry["bytes"] for entry in files.values())


def step_of(checkpoint: Path | str) -> int:
    """Returns the step in a checkpoint's name."""
    return int(Path(checkpoint).name.removeprefix("step-"))


def remove_partial(root: Path) -> None:
    """Removes what a driver left that was killed while it saved."""
    for path in root.glob(".step-*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def remove_checkpoints(root: Path) -> None:
    """Removes every checkpoint, and their directory where nothing else is in it."""
    remove_partial(root)
    for path in _named(root):
        shutil.rmtree(path)

    with suppress(OSError):  # it is not there, or not empty
        root.rmdir()


def _named(root: Path) -> list[Path]:
    """Returns the directories that are named like checkpoints, by step."""
    paths = (path for path in root.glob("step-*") if re.fullmatch("step-[0-9]+", path.name))
    return sorted(paths, key=step_of)


def _require_whole(checkpoint: Path) -> None:
    if why := fault(checkpoint):
        raise FileNotFoundError(f"{checkpoint}: {why}")


def _force_directories(root: Path) -> None:
    for path in (*(path for path in root.rglob("*") if path.is_dir()), root):
        force(path)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)
        force(Path(target))


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


def _advice(root: Path) -> str:
    whole = list_checkpoints(root)
    if not whole:
        return (
            "There is no older checkpoint. Start with --resume auto, perhaps in another "
            "run.directory."
        )

    return (
        f"{whole[-1].name} is whole and kept: perhaps with a lower checkpoint.keep_last, "
        "continue from it with --resume."
    )
