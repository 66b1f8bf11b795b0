"""What a run writes is uploaded in the background, to where ``run.upload`` says.

    a checkpoint is written ──▶ wake ──▶ one pass of the thread: what differs there is brought up to date
                                          1. rows, config, summary, report: the files of the run directory
                                          2. the newest checkpoint that is whole here: files, then manifest
                                          3. until no checkpoint is missing, 1 and 2 again
                                          4. exported models

A pass compares and copies, so that it repairs whatever the one before left undone, and its failure
needs no more than another pass. The rows that are there reach at least to the newest checkpoint that
is whole there: a run that is restored has them all.

A checkpoint that was removed here is removed there, once a newer one is whole there. One that is
under way stays here until it is up, whatever ``checkpoint.keep_last`` says.

Training waits for nothing of this. Left out: logs, ``broken/`` and the folders of trackers.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple, Self

from eopd.config import Config
from eopd.run.checkpoint import MANIFEST, list_checkpoints, step_of
from eopd.run.directory import RunDirectory
from eopd.run.elsewhere import (
    CHECKPOINTS,
    Place,
    checkpoints_at,
    name_run,
    said_by,
    url_of,
)
from eopd.run.lock import holder_in
from eopd.run.place import LOCK
from eopd.run.record import Row

EXPORTS: Final = ("hf", "hf-best", "adapter", "hf-best-adapter")
EVERY_S: Final = 300.0  # rows go up so often where no checkpoint does
FIRST_PAUSE_S: Final = 1.0  # after a failure, and twice as long after the next
LONGEST_PAUSE_S: Final = 60.0
QUIET_S: Final = 120.0  # at the end: since something last arrived
LAST_S: Final = 3600.0  # at the end: in all
SAY_AFTER_S: Final = 5.0

logger = logging.getLogger(__name__)


class TakenOverError(Exception):
    """Another process has taken up the run, and uploads it."""


class Uploads:
    """The uploads of one process that runs a run; none where ``run.upload`` is null.

    Args:
        config: the run's.
        say: is told when the place fails, and at the end what is waited for and what is not up.
    """

    def __init__(self, config: Config, say: Callable[[str], None]) -> None:
        self._run = config.run
        self._directory = RunDirectory(config.run.path)
        self._say = say
        self._pinned: int | None = None  # the step of the checkpoint that is under way
        self._bytes = self._failures = 0
        self._seconds = 0.0
        self._busy_since: float | None = None
        self._fault = "it was not reached"
        self._arrived = time.monotonic()
        self._uploaded: dict[str, _Stamp] = {}  # by name
        self._there: dict[str, str | bytes] = {}  # as ``checkpoints_at``, once it was looked at
        self._newest: int | None = None  # step of the newest that is whole there
        self._lock_there = b""
        self._went_back_to: int | None = None  # what is there of later steps is not of this run
        self._wake, self._ending = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="upload", daemon=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._thread.ident is not None:
            self._end()

    @contextmanager
    def told(self, say: Callable[[str], None]) -> Iterator[None]:
        """Tells ``say`` instead, while the block runs."""
        before, self._say = self._say, say
        try:
            yield
        finally:
            self._say = before

    def start(self) -> None:
        """Begins to upload; this process holds the run's lock, and has begun it or taken it up."""
        if self._run.upload is not None:
            name_run(self._directory.path)
            self._thread.start()

    def wake(self) -> None:
        """Lets the next pass begin now: there is a new checkpoint."""
        self._wake.set()

    def go_back(self, step: int) -> None:
        """Notes that training goes on from a step: checkpoints there of later ones are removed, once
        this one is whole there.
        """
        self._went_back_to = step

    def needed(self) -> set[int]:
        """Returns the step of the checkpoint that is being uploaded, which must stay until it is up."""
        return set() if (pinned := self._pinned) is None else {pinned}

    def row(self) -> Row:
        """Returns the metrics of the uploads of this process; none where it has none."""
        if self._run.upload is None:
            return {}

        busy_since = self._busy_since
        under_way = 0.0 if busy_since is None else time.monotonic() - busy_since
        row = {
            "eopd_upload_bytes_total": float(self._bytes),
            "eopd_upload_seconds_total": self._seconds + under_way,
            "eopd_upload_failures_total": float(self._failures),
        }
        if self._newest is not None:
            row["eopd_uploaded_step"] = float(self._newest)

        return row

    def _work(self) -> None:
        """Makes one pass after the other, until one that began after the end was asked for is done."""
        pause = FIRST_PAUSE_S
        while True:
            self._wake.clear()  # before the end is looked for: it wakes too
            ending = self._ending.is_set()
            started = self._busy_since = time.monotonic()

            try:
                self._pass(last=ending)
            except TakenOverError as error:
                self._fault = str(error)
                self._say(f"run.upload: {error}; nothing more is uploaded from here")
                return
            except Exception as error:  # noqa: BLE001 - whatever it is, the run goes on
                self._fail(error, is_first=pause == FIRST_PAUSE_S)
                wait, pause = pause, min(2 * pause, LONGEST_PAUSE_S)
            else:
                if ending:
                    return

                if pause > FIRST_PAUSE_S:
                    self._say(f"run.upload: {url_of(self._run)} takes files again")

                wait, pause = EVERY_S, FIRST_PAUSE_S
            finally:
                self._busy_since = None
                self._seconds += time.monotonic() - started

            self._wake.wait(wait)

    def _fail(self, error: Exception, *, is_first: bool) -> None:
        self._failures += 1
        self._fault = said_by(error)
        say = self._say if is_first else logger.info
        say(f"run.upload: {url_of(self._run)}: {self._fault}; trying again")

    def _pass(self, *, last: bool) -> None:
        place = Place(url_of(self._run))
        self._require_ours(place)
        while True:
            here = self._whole_here()
            self._remove_there(place, here)
            for path in self._small_files():
                self._put(place, path)

            missing = self._missing(here)
            if not missing:
                break

            self._put_checkpoint(place, missing[-1], here[missing[-1]])

        for path in self._exported_files():
            self._put(place, path)

        if last:
            place.write(LOCK, b"")

    def _whole_here(self) -> dict[str, bytes]:
        """Returns the manifests of the checkpoints that are whole here, by name, oldest first."""
        manifests = {}
        for path in list_checkpoints(self._directory.checkpoints):
            with suppress(FileNotFoundError):  # it was removed since
                manifests[path.name] = (path / MANIFEST).read_bytes()

        return manifests

    def _missing(self, here: Mapping[str, bytes]) -> list[str]:
        """Returns which of the checkpoints ``here`` are not whole there. A manifest has the digest of
        a state with its time: those of two checkpoints of one step differ.
        """
        return [name for name, manifest in here.items() if self._there.get(name) != manifest]

    def _require_ours(self, place: Place) -> None:
        """Looks at what is there, and notes there that this process uploads the run; later, stops where
        another one has noted so since.

        Raises:
            TakenOverError: a later one has.
        """
        if not self._lock_there:
            self._there = checkpoints_at(place, place.sizes())
            lock = (self._directory.path / LOCK).read_bytes()
            place.write(LOCK, lock)
            self._lock_there = lock
        elif (found := place.read(LOCK)) != self._lock_there:
            holder = holder_in(found or b"") or "another process"
            raise TakenOverError(f"{place.url} is now uploaded to by {holder}")

    def _put(self, place: Place, path: Path) -> None:
        """Uploads a file, unless it is what this process has uploaded under its name."""
        name, stamp = self._name_of(path), _stamp(path)
        if self._uploaded.get(name) == stamp:
            return

        place.put(path, name, self._note_arrival)
        self._note_arrival()
        self._uploaded[name] = stamp
        self._bytes += stamp.size

    def _note_arrival(self) -> None:
        self._arrived = time.monotonic()

    def _put_checkpoint(self, place: Place, name: str, manifest: bytes) -> None:
        """Uploads a checkpoint, its manifest last; one of that name that is there is not whole
        meanwhile.
        """
        folder = f"{CHECKPOINTS}/{name}"
        checkpoint = self._directory.checkpoints / name
        self._pinned = step_of(name)
        try:
            place.remove(f"{folder}/{MANIFEST}")
            self._there[name] = "it is being uploaded"
            for file in json.loads(manifest)["files"]:
                self._put(place, checkpoint / file)

            place.write(f"{folder}/{MANIFEST}", manifest)
        finally:
            self._pinned = None

        self._there[name] = manifest
        self._newest = max(self._newest or 0, step_of(name))
        logger.info("run.upload: %s is whole at %s", name, place.url)

    def _remove_there(self, place: Place, here: Mapping[str, bytes]) -> None:
        """Removes what is not here any more: what is older than one that is whole there, and what
        training went back before.
        """
        up = here.keys() - self._missing(here)
        if not up:
            return

        newest_up, back_to = max(map(step_of, up)), self._went_back_to
        for name in self._there.keys() - here.keys():
            if step_of(name) < newest_up or (back_to is not None and step_of(name) > back_to):
                place.remove(f"{CHECKPOINTS}/{name}/{MANIFEST}")
                place.remove_folder(f"{CHECKPOINTS}/{name}")
                del self._there[name]

        self._newest = newest_up
        # it may have gone back once more meanwhile, for the next pass
        if self._went_back_to == back_to:
            self._went_back_to = None

    def _small_files(self) -> Iterator[Path]:
        for path in sorted(self._directory.path.iterdir()):
            if path.is_file() and path.name != LOCK and not path.name.startswith("."):
                yield path

    def _exported_files(self) -> Iterator[Path]:
        for folder in EXPORTS:
            for path in sorted((self._directory.path / folder).rglob("*")):
                if path.is_file():
                    yield path

    def _end(self) -> None:
        """Waits for what is not up yet, for as long as something arrives, and names what is left."""
        self._ending.set()
        self._wake.set()
        with suppress(KeyboardInterrupt):
            self._wait()

        if missing := self._not_up():
            self._say(
                f"warning: run.upload: not up at {url_of(self._run)}: {', '.join(missing)} "
                f"({self._fault}). All of it is in {self._directory.path}; the same command with "
                "--resume auto uploads it"
            )

    def _wait(self) -> None:
        began = self._arrived = time.monotonic()
        self._thread.join(SAY_AFTER_S)
        if self._thread.is_alive():
            names = ", ".join(self._not_up())
            self._say(f"uploading to {url_of(self._run)}: {names}; Ctrl-C ends the wait")

        while self._thread.is_alive():
            self._thread.join(0.2)
            now = time.monotonic()
            if now - self._arrived > QUIET_S or now - began > LAST_S:
                return

    def _not_up(self) -> list[str]:
        """Returns what the run directory has and the place has not: checkpoints, files, folders."""
        names = [f"{CHECKPOINTS}/{name}" for name in self._missing(self._whole_here())]
        for path in (*self._small_files(), *self._exported_files()):
            if self._uploaded.get(name := self._name_of(path)) != _stamp(path):
                names.append(name.partition("/")[0])

        return list(dict.fromkeys(names))

    def _name_of(self, path: Path) -> str:
        return path.relative_to(self._directory.path).as_posix()


class _Stamp(NamedTuple):
    """What tells a file from one that was there before under its name."""

    inode: int
    size: int
    changed_ns: int


def _stamp(path: Path) -> _Stamp:
    entry = path.stat()
    return _Stamp(entry.st_ino, entry.st_size, entry.st_mtime_ns)
