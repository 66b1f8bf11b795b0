"""Data sets by name, of the ``datasets`` library: their names are pinned to commits, and loaded."""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from eopd.config import ConfigError
from eopd.config.base import DATA_SUFFIXES
from eopd.config.names import DataName, is_commit
from eopd.hub import cached_commit, find_commit, require_commit

if TYPE_CHECKING:
    from datasets import Dataset

# Kinds of files that people have rows in, and that are not read here. Any other ending may be part
# of the name of a data set.
OTHER_SUFFIXES: Final = frozenset(
    [
        ".arrow",
        ".avro",
        ".bz2",
        ".csv",
        ".feather",
        ".gz",
        ".h5",
        ".json",
        ".jsonlines",
        ".ndjson",
        ".npy",
        ".npz",
        ".orc",
        ".pickle",
        ".pkl",
        ".pq",
        ".tar",
        ".tsv",
        ".txt",
        ".xls",
        ".xlsx",
        ".xz",
        ".yaml",
        ".yml",
        ".zip",
        ".zst",
    ]
)

ROW_SUFFIXES: Final = frozenset([".arrow", ".csv", ".jsonl", ".ndjson", ".parquet", ".tsv"])
_SAVED_TO_DISK: Final = ("state.json", "dataset_dict.json")
_SHOWN: Final = 3
_CONFIGS: Final = re.compile(rb"^configs:", re.MULTILINE)


def names_a_data_set(spec: str) -> bool:
    """Tells whether a spec is the name of a data set, and not that of a file that has rows.

    Raises:
        OSError: it is too long for either.
    """
    path = Path(os.path.expanduser(spec))
    return path.suffix.lower() not in {*OTHER_SUFFIXES, *DATA_SUFFIXES} and not path.is_file()


def pin_data(key: str, spec: str, before: Mapping[str, str]) -> str:
    """Returns the spec of a data set with the commit behind its revision; that of a file or of a
    directory as it is.

    Args:
        key: the key of the config, for messages.
        spec: what stands there.
        before: the specs of the run that goes on, by their keys. A name without a revision keeps
            the commit that the run began with.

    Raises:
        ConfigError: it has too many parts, or the Hub does not show it.
    """
    name = _name_on_the_hub(key, spec)
    if name is None:
        return spec

    began = _name_on_the_hub(key, before.get(key, ""))
    if name.revision is None and began and began.repository == name.repository:
        return str(replace(name, revision=began.revision))

    try:
        commit = find_commit("dataset", name.repository, name.revision, spec)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}; nor is it a file or a directory here") from None

    return str(replace(name, revision=commit))


def cached_data(key: str, spec: str) -> str | None:
    """Returns the spec of data that is on this machine, a data set with the commit that its cache
    holds; None where it is not here. Nobody is asked.

    Raises:
        ConfigError: it has too many parts.
    """
    name = _name_on_the_hub(key, spec)
    if name is None:
        is_here = os.path.exists(spec) or os.path.isdir(spec.partition(":")[0])
        return spec if is_here else None

    commit = cached_commit("dataset", name.repository, name.revision, spec)
    pinned = replace(name, revision=commit)
    return None if commit is None or _cached(pinned) is None else str(pinned)


def _name_on_the_hub(key: str, spec: str) -> DataName | None:
    """Returns the name of a data set; None where a file or a directory is named."""
    try:
        if not spec or spec.startswith((".", "/", "~")) or not names_a_data_set(spec):
            return None
    except OSError:  # whoever reads it says so
        return None

    name = parse_data_name(key, spec)
    if os.path.isfile(name.repository):
        raise ConfigError(f"{key}: {spec}: a file has no splits; write {name.repository}")

    return None if os.path.isdir(name.repository) else name


def parse_data_name(key: str, spec: str) -> DataName:
    """Returns the parts of the name of a data set.

    Raises:
        ConfigError: it has too many parts, or an empty one.
    """
    try:
        return DataName.parse(spec)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from None


def load_named(name: DataName) -> "Dataset":
    """Loads the rows of a data set by name.

    One that is pinned comes from exactly that commit, from the cache where it is there. The library
    itself, where it cannot reach the Hub, takes the newest commit that its cache happens to hold.

    Raises:
        Exception: whatever the library raises, or a ``ConfigError`` of ours.
    """
    import datasets

    folder = Path(name.repository)
    if folder.is_dir() and not any((folder / mark).exists() for mark in _SAVED_TO_DISK):
        builder = datasets.load_dataset_builder(name.repository, name.subset)
        _require_all_read(folder, builder.config.data_files or {})
        builder.download_and_prepare()
        return builder.as_dataset(split=name.split)

    if not is_commit(name.revision):
        return datasets.load_dataset(
            name.repository, name.subset, split=name.split, revision=name.revision
        )

    if (cached := _cached(name)) is not None:
        return cached

    require_commit("dataset", name.repository, name.revision, str(name))
    builder = datasets.load_dataset_builder(
        name.repository,
        name.subset,
        revision=name.revision,
    )
    if builder.hash != name.revision:
        raise ConfigError(f"{name}: the Hub did not send it; the cache has commit {builder.hash}")

    builder.download_and_prepare()
    return builder.as_dataset(split=name.split)


def _require_all_read(folder: Path, by_split: Mapping[str, Iterable[str]]) -> None:
    """Refuses a folder of which files with rows would be left out. Without a word the library reads the
    most frequent kind of files alone; and where some names say a split (``train``, ``test``), it
    leaves out those that say none (datasets 5.2). A folder whose card has ``configs`` says itself what
    is read.

    Args:
        folder: where they lie.
        by_split: the files that the library reads, by absolute path, of every split.

    Raises:
        ConfigError: rows would be left out.
    """
    root = folder.resolve()
    read = {Path(file) for files in by_split.values() for file in files}
    left_out = [str(path.relative_to(root)) for path in _row_files(root) if path not in read]
    if left_out and not _says_what_is_read(folder):
        shown = ", ".join(left_out[:_SHOWN]) + (", ..." if left_out[_SHOWN:] else "")
        raise ConfigError(
            f"{folder}: {len(left_out)} of its files would be left out ({shown}): files of another "
            "kind than most, or whose names say no split where others do; move them to a folder of "
            "their own, or say by `configs` in a README.md what is read"
        )


def _row_files(root: Path) -> list[Path]:
    """Returns the files below a folder that surely hold rows, in order; a .json often says something
    about others.
    """
    return sorted(
        path
        for path in root.rglob("*")
        if not ROW_SUFFIXES.isdisjoint(suffix.lower() for suffix in path.suffixes)
        and not any(part.startswith((".", "_")) for part in path.relative_to(root).parts)
        and path.is_file()
    )


def _says_what_is_read(folder: Path) -> bool:
    """Whether the card of a folder has ``configs``: at the top of its README, or in a file alone."""
    readme, alone = folder / "README.md", folder / ".huggingface.yaml"
    top = readme.read_bytes().split(b"---")[1:2] if readme.is_file() else []
    texts = [*top, alone.read_bytes()] if alone.is_file() else top
    return any(_CONFIGS.search(text) for text in texts)


def _cached(name: DataName) -> "Dataset | None":
    """Returns the rows of a commit from the library's cache; None where they are not there, or
    where no subset is named and several are.
    """
    import datasets
    from datasets.packaged_modules.cache.cache import Cache

    root = Path(datasets.config.HF_DATASETS_CACHE).expanduser()
    whole = list(root.glob(f"*/{name.subset or '*'}/*/{name.revision}/dataset_info.json"))
    if len(whole) != 1:
        return None

    subset, version, commit = whole[0].parent.parts[-3:]
    builder = Cache(
        repo_id=name.repository,
        dataset_name=name.repository.rpartition("/")[2],
        config_name=subset,
        version=version,
        hash=commit,
    )
    return builder.as_dataset(split=name.split)
