"""A run directory is brought back from where ``run.upload`` keeps the run.

    here                              there                            ``--resume`` and ``--resume auto``
    no run, or no whole checkpoint    a whole checkpoint               restored
    the run                           the run, which went on further   restored
    the run                           the same, or less                nothing to do
    the run                           another run of that name         refused
    anything                          no whole checkpoint              nothing to restore

Without ``--resume`` a run that has begun there is refused. A run has gone on further where it was
taken up more often, or as often and has a later checkpoint: on another machine, or
here before the newest checkpoints were lost.

Checkpoints of this directory that are not kept there are of the steps that the other process did
anew, and are removed. Whatever is restored is on disk under another name until it is complete, and
``summary.json`` comes last: a restoration that is killed is done again.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal

from eopd.config import Config, ConfigError, load_config
from eopd.run.checkpoint import MANIFEST, fault, list_checkpoints, step_of
from eopd.run.directory import RunDirectory
from eopd.run.elsewhere import CHECKPOINTS, Place, blamed, checkpoints_at, place_of, run_id
from eopd.run.lock import Holder, holder_in
from eopd.run.place import LOCK
from eopd.run.reading import parse_object
from eopd.run.record import RUN_ID

CONFIG: Final = "config.yaml"
SUMMARY: Final = "summary.json"
# restored first: it says that there is a run, to who has to restore it again
_VERSIONS: Final = "versions.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A run as it is kept elsewhere: its files with their sizes, its whole checkpoints with their
    manifests, the others with their faults, the process that uploaded it last and did not end in
    order, its id, and how often it was taken up.
    """

    sizes: Mapping[str, int]
    whole: Mapping[str, bytes]
    faults: Mapping[str, str]
    holder: Holder | None
    id: str
    resumes: int

    @classmethod
    def at(cls, place: Place) -> "Kept":
        """Looks at a place."""
        sizes = place.sizes()
        checkpoints = checkpoints_at(place, sizes)
        summary = parse_object((place.read(SUMMARY) or b"").decode(errors="replace"))
        return cls(
            sizes=sizes,
            whole={name: state for name, state in checkpoints.items() if isinstance(state, bytes)},
            faults={name: state for name, state in checkpoints.items() if isinstance(state, str)},
            holder=holder_in(place.read(LOCK) or b""),
            id=(place.read(RUN_ID) or b"").decode(errors="replace"),
            resumes=_resumes(summary),
        )

    @property
    def has_begun(self) -> bool:
        """Whether a step was trained, or a checkpoint uploaded."""
        return "trained.jsonl" in self.sizes or bool(self.whole) or bool(self.faults)

    @property
    def newest(self) -> int:
        """The step of the newest whole checkpoint, or 0."""
        return max((step_of(name) for name in self.whole), default=0)


def config_of_kept(config: Config) -> Config | None:
    """Returns the config of the run that is kept elsewhere, as it was written last; None where there
    is none.

    Raises:
        ConfigError: it cannot be read.
    """
    place = place_of(config.run)
    if place is None:
        return None

    with blamed(place.url, "read"), tempfile.TemporaryDirectory() as temporary:
        text = place.read(CONFIG)
        if text is None:
            return None

        file = Path(temporary) / CONFIG
        file.write_bytes(text)
        return load_config(file)


def restore(
    config: Config, resume: Literal["no", "yes", "auto"], say: Callable[[str], None]
) -> list[str]:
    """Brings a run back into its directory, where that lacks what is kept elsewhere; the caller holds
    the run's lock.

    Args:
        config: the run's.
        resume: ``--resume`` of the command line.
        say: is told what takes time.

    Returns:
        Messages for people.

    Raises:
        ConfigError: another run is kept there, or this one cannot be read.
    """
    place = place_of(config.run)
    if place is None:
        return []

    with blamed(place.url, "read"):
        kept = Kept.at(place)
        if not kept.has_begun:
            return []

        directory = RunDirectory(config.run.path)
        _require_this_run(directory, place, kept, resume)
        passed_over = [
            f"passing over {place.url}/{CHECKPOINTS}/{name}: {why}"
            for name, why in kept.faults.items()
            if step_of(name) > kept.newest
        ]
        if not kept.whole or _has_gone_as_far(directory, kept):
            return passed_over

        return [*passed_over, *_bring_back(directory.path, place, kept, say)]


def _require_this_run(directory: RunDirectory, place: Place, kept: Kept, resume: str) -> None:
    again = "--resume" if kept.whole else "--resume auto"
    if resume == "no":
        raise ConfigError(
            f"run.upload: {place.url} holds a run already, with {_described(kept)}; continue it with "
            f"{again}, or choose another run.name"
        )

    is_here = directory.num_steps() > 0 or bool(list_checkpoints(directory.checkpoints))
    if kept.whole and is_here and run_id(directory.path) != kept.id:
        raise ConfigError(
            f"run.upload: {place.url} holds another run than {directory.path}; choose another "
            "run.upload, or another run.name"
        )

    if resume == "yes" and not kept.whole and not is_here:
        raise ConfigError(
            f"run.upload: {place.url} has {_described(kept)}; start the run over with {again}"
        )


def _described(kept: Kept) -> str:
    if kept.whole:
        return f"checkpoints up to step {kept.newest}"

    faults = [f"{name}: {why}" for name, why in kept.faults.items()]
    return "; ".join(["no checkpoint that is whole", *faults])


def _has_gone_as_far(directory: RunDirectory, kept: Kept) -> bool:
    """Returns whether the run that is here has gone on at least as far as the one that is kept."""
    here = list_checkpoints(directory.checkpoints)
    if not here:
        return False

    summary = directory.read_summary()
    if summary is None and SUMMARY in kept.sizes:  # a restoration was killed
        return False

    resumes = 0 if summary is None else _resumes(asdict(summary))
    return (resumes, step_of(here[-1])) >= (kept.resumes, kept.newest)


def _resumes(summary: Mapping[str, object]) -> int:
    """Returns how often a run was taken up again, by its summary."""
    counts = [summary.get(name, 0) for name in ("incarnation", "learner_restarts")]
    incarnation, restarts = (count if isinstance(count, int) else 0 for count in counts)
    return incarnation - restarts


def _bring_back(run: Path, place: Place, kept: Kept, say: Callable[[str], None]) -> list[str]:
    """Restores all files of the run, then its checkpoints, then its summary, in place of what is here."""
    files = [name for name in kept.sizes if "/" not in name and name not in (LOCK, SUMMARY)]
    files = [name for name in files if not name.startswith(".")]
    files.sort(key=lambda name: (name != _VERSIONS, name != RUN_ID))
    size = sum(kept.sizes[f"{CHECKPOINTS}/{name}/{file}"] for name, file in _files_of(kept))
    say(f"restoring {run} from {place.url}: {', '.join(kept.whole)}, {size / 1e9:.2f} GB")
    _remove_others(run / CHECKPOINTS, kept)
    for name in files:
        place.get(name, run / name)

    notes = []
    for name, manifest in kept.whole.items():
        why = _bring_checkpoint(run / CHECKPOINTS, place, name, manifest)
        if why is not None:
            notes.append(f"passing over {place.url}/{CHECKPOINTS}/{name}: {why}")

    if len(notes) == len(kept.whole):
        raise ConfigError(f"run.upload: {place.url} holds no checkpoint that is whole: {notes}")

    if SUMMARY in kept.sizes:
        place.get(SUMMARY, run / SUMMARY)

    notes.append(f"restored from {place.url}, up to step {kept.newest}")
    if kept.holder is not None:
        notes.append(
            f"{place.url}/{LOCK} names {kept.holder}, which did not leave in order. If it still "
            "runs, stop it: from now on this process uploads the run, and that one does not"
        )

    return notes


def _remove_others(root: Path, kept: Kept) -> None:
    """Removes the checkpoints here that are not those kept, after the summary, which speaks of them."""
    (root.parent / SUMMARY).unlink(missing_ok=True)
    for path in list_checkpoints(root):
        if (path / MANIFEST).read_bytes() != kept.whole.get(path.name):
            shutil.rmtree(path)


def _files_of(kept: Kept) -> list[tuple[str, str]]:
    return [(name, file) for name in kept.whole for file in json.loads(kept.whole[name])["files"]]


def _bring_checkpoint(root: Path, place: Place, name: str, manifest: bytes) -> str | None:
    """Restores a checkpoint that is not here; returns what is wrong with it, if anything is."""
    final, partial = root / name, root / f".{name}.partial"
    if (final / MANIFEST).is_file() and (final / MANIFEST).read_bytes() == manifest:
        return fault(final)

    shutil.rmtree(partial, ignore_errors=True)
    try:
        for file in (*json.loads(manifest)["files"], MANIFEST):
            place.get(f"{CHECKPOINTS}/{name}/{file}", partial / file)

        if (why := fault(partial)) is None:
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)

    return why
