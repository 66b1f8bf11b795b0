"""A model by name becomes a directory of this machine: its snapshot in the library's cache.

This is the one place that does so, on whatever node it is called.
"""

import os
from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import cache, partial
from pathlib import Path
from typing import Final

from eopd.config import ConfigError
from eopd.config.names import ModelName
from eopd.hub.commits import cached_commit, find_commit
from eopd.hub.faults import in_time, told

# What a run, transformers and vLLM read of a model besides its weights; all of it is small.
READ: Final = (
    "*.json",
    "*.jinja",
    "*.model",
    "*.py",
    "*.tiktoken",
    "additional_chat_templates/*",
    "merges.txt",
    "tokenizer*",
    "vocab*",
)
# A repository may hold its weights several times. The first of these that it has is taken: an index
# counts for nothing without weights.
WEIGHTS: Final = (
    ("model.safetensors",),
    ("model-*.safetensors", "model.safetensors.index.json"),
    ("*.safetensors", "*.safetensors.index.json"),
    ("pytorch_model.bin",),
    ("pytorch_model-*.bin", "pytorch_model.bin.index.json"),
    ("*.bin", "*.bin.index.json"),
)


@cache
def model_directory(spec: str, *, weights: bool = False) -> Path:
    """Returns the directory of a model: the path itself, or the snapshot of a name in this
    machine's cache. What the cache lacks is downloaded, and nothing is asked where it lacks
    nothing.

    Args:
        spec: ``student.model`` or another key of the kind.
        weights: whether the weights are read too; else configuration and tokenizer are enough.

    Raises:
        ConfigError: the model is not there, may not be read, or cannot be downloaded.
    """
    name = ModelName.parse(spec)
    if name is None:
        return Path(spec)

    commit = find_commit("model", name.repository, name.revision, spec)
    with told(spec, "model", name.repository, commit):
        directory = _snapshot(name.repository, commit)
        if directory is not None and _has_all(name.repository, commit, weights=weights):
            return directory

        return _download(name.repository, commit, weights=weights)


def cached_directory(spec: str, *, weights: bool = False) -> Path | None:
    """Returns the directory of a model as far as it is on this machine, or None: of a name where the
    cache has at least its ``config.json``. Nobody is asked, and nothing downloaded.

    Args:
        spec: as in ``model_directory``.
        weights: whether the cache must hold all weights of a name, as far as it knows them. A
            directory that is named by its path may lack them.

    Raises:
        ConfigError: no model can have such a name.
    """
    name = ModelName.parse(spec)
    if name is None:
        return Path(spec) if os.path.lexists(spec) else None

    commit = cached_commit("model", name.repository, name.revision, spec)
    if commit is None or (weights and not _has_all(name.repository, commit, weights=True)):
        return None

    return _snapshot(name.repository, commit)


def require_cached_directory(spec: str) -> Path:
    """Returns the directory of a model on this machine, which holds at least its ``config.json``.

    Raises:
        ConfigError: it is not here.
    """
    directory = cached_directory(spec)
    if directory is not None and (directory / "config.json").is_file():
        return directory

    name = ModelName.parse(spec)
    if name is None:
        raise ConfigError(f"{spec}: there is no such model directory, or no config.json in it")

    revision = f" --revision {name.revision}" if name.revision else ""
    raise ConfigError(
        f"{spec}: the cache of this machine has no config.json of it; "
        f"`hf download {name.repository} config.json{revision}` fetches that file alone"
    )


def needed(files: Iterable[str], *, weights: bool) -> list[str]:
    """Returns those files of a repository that a run reads: of weights that are there in several
    formats, one.
    """
    files = list(files)
    chosen = [file for file in files if _matches(file, READ) and not file.endswith(".index.json")]
    for patterns in WEIGHTS if weights else ():
        found = [file for file in files if _matches(file, patterns)]
        if any(not file.endswith(".json") for file in found):
            return sorted({*chosen, *found})

    return sorted(chosen)


def _matches(file: str, patterns: Iterable[str]) -> bool:
    """Tells whether a file matches a pattern, in which ``*`` stands for no ``/``."""
    depth = file.count("/")
    return any(fnmatchcase(file, pattern) and pattern.count("/") == depth for pattern in patterns)


def _known_files(repository: str, commit: str) -> list[str] | None:
    """Returns the files of a commit as the cache knows them; None where it does not."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        return [file.path for file in get_cached_repo_tree(repository, revision=commit)]
    except CachedRepoTreeNotFoundError:
        return None


def _has_all(repository: str, commit: str, *, weights: bool) -> bool:
    """Tells whether the cache holds what a run reads of a commit, as far as it knows its files."""
    from huggingface_hub import try_to_load_from_cache

    known = _known_files(repository, commit)
    if known is None:
        return False

    files = needed(known, weights=weights)
    found = (try_to_load_from_cache(repository, file, revision=commit) for file in files)
    return all(isinstance(path, str) for path in found)


def _snapshot(repository: str, commit: str) -> Path | None:
    """Returns the snapshot of a commit in the cache, if that has its ``config.json``."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, "config.json", revision=commit)
    return Path(found).parent if isinstance(found, str) else None


def _download(repository: str, commit: str, *, weights: bool) -> Path:
    """Downloads what the cache lacks of a commit."""
    import httpx2
    from huggingface_hub import HfApi, snapshot_download

    try:
        # at once and without repetitions, as the library's own question is not
        info = in_time(partial(HfApi().model_info, repository, revision=commit))
    except (OSError, httpx2.HTTPError):
        # a snapshot that another version of the library made, without a list of its files
        directory = _snapshot(repository, commit)
        if directory is None or _known_files(repository, commit) is not None:
            raise

        return directory

    listed = [file.rfilename for file in info.siblings or ()]
    if "config.json" not in listed:
        raise ConfigError(f"{repository}: is no model of transformers (it has no config.json)")

    files = needed(listed, weights=weights)
    return Path(snapshot_download(repository, revision=commit, allow_patterns=files))
