"""The place where a run is kept besides its run directory: a folder of an object store or of another
disk, through fsspec.

    run.upload: s3://bucket/folder        then run NAME lies in s3://bucket/folder/NAME,
                                          file by file as in its run directory

A file appears there whole or not at all: object stores promise that, and on a disk it is written
under another name first. Whether a checkpoint is whole is said by its manifest and by the sizes of
its files, as in a run directory.

Credentials, endpoints and regions are those of the store's own environment variables and files
(``AWS_PROFILE``, ``AWS_ENDPOINT_URL``, ``GOOGLE_APPLICATION_CREDENTIALS``, ...), and fsspec's
(``FSSPEC_S3_...``). Only the driver needs them.
"""

import json
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import wait
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Final

from eopd.config import ConfigError, RunConfig
from eopd.daemon import in_daemon
from eopd.run.checkpoint import MANIFEST, step_of
from eopd.run.record import RUN_ID
from eopd.run.storage import replaced, write_whole

CHECKPOINTS: Final = "checkpoints"
PROBE: Final = ".eopd-check-"
PROBE_S: Final = 30.0
EXTRAS: Final = {"s3": "s3", "gs": "gcs"}

# A request is tried twice: who uploads tries again for as long as the run lives, and who begins a
# run wants to know.
_RETRIES: Final = {"total_max_attempts": 2, "mode": "standard"}
_OPTIONS: Final[Mapping[str, Mapping[str, object]]] = {
    "s3": {"use_listings_cache": False, "config_kwargs": {"retries": _RETRIES}},
    "gs": {"use_listings_cache": False},
    "file": {"auto_mkdir": True},
}


class Place:
    """A folder elsewhere. The names of its files are relative to it, with slashes.

    Errors are those of its file system, which have no common base.
    """

    def __init__(self, url: str) -> None:
        from fsspec.callbacks import Callback
        from fsspec.core import url_to_fs

        protocol = url.partition("://")[0]
        self.url = url
        self._on_disk = protocol == "file"
        self._callback = Callback
        self._fs, self._root = url_to_fs(url, **_OPTIONS[protocol])

    def put(self, local: Path, name: str, moved: Callable[[], None]) -> None:
        """Writes a file from here over the one that is there; ``moved`` is called whenever a part of
        it has arrived.
        """
        callback = self._callback(hooks={"moved": lambda size, value: moved()})
        with self._replaced(name) as target:
            self._fs.put_file(str(local), target, callback=callback)

    def write(self, name: str, content: bytes) -> None:
        """Writes a small file."""
        with self._replaced(name) as target:
            self._fs.pipe_file(target, content)

    def read(self, name: str) -> bytes | None:
        """Returns what a small file holds, or None where there is none."""
        try:
            return bytes(self._fs.cat_file(self._path(name)))
        except FileNotFoundError:
            return None

    def get(self, name: str, local: Path) -> None:
        """Writes a file from there over the one that is here, whole or not at all."""
        local.parent.mkdir(parents=True, exist_ok=True)
        with replaced(local) as made:
            self._fs.get_file(self._path(name), str(made))

    def remove(self, name: str) -> None:
        """Removes a file, where it is there."""
        with suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))

    def remove_folder(self, name: str) -> None:
        """Removes a folder with all that is in it, where it is there."""
        with suppress(FileNotFoundError):
            self._fs.rm(self._path(name), recursive=True)

    def sizes(self) -> dict[str, int]:
        """Returns the size of every file, by name."""
        found: Mapping[str, Mapping[str, int]] = self._fs.find(self._root, detail=True)
        prefix = f"{self._root}/"
        return {path.removeprefix(prefix): int(info["size"]) for path, info in found.items()}

    @contextmanager
    def _replaced(self, name: str) -> Iterator[str]:
        """Yields the path to write, of which a reader sees nothing until the block ends."""
        target = self._path(name)
        if not self._on_disk:
            yield target
            return

        folder, _, last = target.rpartition("/")
        partial = f"{folder}/.{last}.partial"
        try:
            yield partial
            self._fs.mv(partial, target)
        except BaseException:
            with suppress(OSError):
                self._fs.rm_file(partial)

            raise

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


def place_of(run: RunConfig) -> Place | None:
    """Returns where the files of a run go besides its directory; None where nowhere."""
    return None if run.upload is None else Place(url_of(run))


def url_of(run: RunConfig) -> str:
    """Returns the address of a run that is uploaded."""
    return f"{str(run.upload).rstrip('/')}/{run.name}"


def name_run(directory: Path) -> None:
    """Gives a run its id, by which another of its name is told from it, where it has none."""
    if run_id(directory) is None:
        write_whole(directory / RUN_ID, uuid.uuid4().hex)


def run_id(directory: Path) -> str | None:
    """Returns the id of a run; None where it has none, since it was never uploaded."""
    path = directory / RUN_ID
    return path.read_text(encoding="utf-8") if path.is_file() else None


def checkpoints_at(place: Place, sizes: Mapping[str, int]) -> dict[str, str | bytes]:
    """Returns the checkpoints that are there, oldest first, by name: of one that is whole the bytes of
    its manifest, of any other what is wrong with it. ``sizes`` are those of the place.
    """
    names = {name.split("/")[1] for name in sizes if name.startswith(f"{CHECKPOINTS}/")}
    steps = (name for name in names if re.fullmatch("step-[0-9]+", name))
    return {name: _manifest_or_fault(place, name, sizes) for name in sorted(steps, key=step_of)}


def _manifest_or_fault(place: Place, checkpoint: str, sizes: Mapping[str, int]) -> str | bytes:
    folder = f"{CHECKPOINTS}/{checkpoint}"
    manifest = place.read(f"{folder}/{MANIFEST}")
    if manifest is None:
        return f"{MANIFEST} is missing: it was not uploaded to its end"

    try:
        files: Mapping[str, Mapping[str, object]] = json.loads(manifest)["files"]
        wrong = [
            name for name, entry in files.items() if sizes.get(f"{folder}/{name}") != entry["bytes"]
        ]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} is not what was written"

    return f"{wrong[0]} is missing or has another size" if wrong else manifest


def require_upload(run: RunConfig) -> None:
    """Checks that files can be written where ``run.upload`` says: one is written, read, and removed.

    Raises:
        ConfigError: they cannot, there is no answer within ``PROBE_S``, or that place is the run
            directory.
    """
    url = url_of(run)
    here = run.path.resolve()
    if url.startswith("file://"):
        there = Path(url.removeprefix("file://")).resolve()
        if there == here or there in here.parents or here in there.parents:
            raise ConfigError(
                f"run.upload: {url} is in the run directory {here}, or holds it; name another folder"
            )

        if not there.parent.parent.is_dir():
            raise ConfigError(
                f"run.upload: there is no folder {there.parent.parent} to hold {there.parent.name}; "
                "make it, or mount the disk that has it"
            )

    probe = in_daemon(partial(_probe, url), "upload-probe")
    if wait([probe], PROBE_S).not_done:
        raise ConfigError(f"run.upload: {url} does not answer within {PROBE_S:g} s. {_NETWORK}")

    probe.result()


def _probe(url: str) -> None:
    name = f"{PROBE}{uuid.uuid4().hex}"
    with blamed(url, "written"):
        place = Place(url)
        place.write(name, b"1")
        place.sizes()
        place.remove(name)


_NETWORK: Final = (
    "Look at the network, at the credentials, and at the store's address (AWS_ENDPOINT_URL where it "
    "is not Amazon's); or leave run.upload out"
)
_ADVICE: Final[Mapping[type[Exception], str]] = {
    FileNotFoundError: "Make the bucket or the folder first, or name one that is there",
    PermissionError: "Give credentials that may write, read, list and delete there",
}


@contextmanager
def blamed(url: str, done: str) -> Iterator[None]:
    """Raises any error of the block as a ``ConfigError`` about ``run.upload``; ``done`` says what it
    cannot be, such as ``read``.
    """
    try:
        yield
    except ConfigError:
        raise
    except ImportError as error:
        protocol = url.partition("://")[0]
        raise ConfigError(
            f"run.upload: {url} needs a package that is not installed ({error}); pip install "
            f"'eopd[{EXTRAS.get(protocol, protocol)}]'"
        ) from None
    except Exception as error:  # noqa: BLE001 - those of network libraries have no common base
        kinds = (advice for kind, advice in _ADVICE.items() if isinstance(error, kind))
        advice = next(kinds, _NETWORK)
        raise ConfigError(
            f"run.upload: {url} cannot be {done}: {said_by(error)}. {advice}"
        ) from None


def said_by(error: BaseException) -> str:
    """Returns what an error says, in one line that ends without a full stop."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.rstrip(".")
