"""Whether the disk of a run that begins has room for checkpoints, from the sizes in the student's files."""

import math
from collections.abc import Iterator

from eopd.config import Config, ConfigError
from eopd.hub import model_directory
from eopd.planning.needs import checkpoint_bytes, checkpoints_at_a_time
from eopd.preflight.weights import read_tensors
from eopd.run.place import holds_rows
from eopd.run.storage import free_bytes
from eopd.tokenizer import read_json


def require_disk(config: Config) -> None:
    """Checks that a checkpoint fits where a run that begins will write it. One that goes on has those
    that it may remove.

    Raises:
        ConfigError: not even one does.
    """
    path, least = config.run.path, least_bytes(config)
    free = free_bytes(path)
    if not holds_rows(path) and free < least:
        raise ConfigError(
            f"run.directory: {_shown(free)} are free where {path} lies, and one checkpoint of this "
            f"student takes {_shown(least)} or more; free some space, or name another disk"
        )


def disk_notes(config: Config) -> Iterator[str]:
    """Yields what the checkpoints of a run that begins take, where that is more than is free."""
    number, free = checkpoints_at_a_time(config), free_bytes(config.run.path)
    needed = number * least_bytes(config)
    if not holds_rows(config.run.path) and free < needed:
        yield (
            f"checkpoint.keep_last: the {number} checkpoints that lie there at a time take "
            f"{_shown(needed)} or more, and {_shown(free)} are free where {config.run.path} lies"
        )


def least_bytes(config: Config) -> int:
    """Returns what a checkpoint of the run takes at least; 0 where the student's files do not say."""
    try:
        directory = model_directory(config.student.model)
        tensors = dict(read_tensors(directory, standard_names=True) or {})
        is_tied = bool(read_json(directory / "config.json").get("tie_word_embeddings"))
    except (ConfigError, ValueError, OSError):  # whoever reads the weights says so
        return 0

    if is_tied:
        tensors.pop("lm_head.weight", None)  # a copy, which some files hold

    return checkpoint_bytes(config, sum(math.prod(tensor.shape) for tensor in tensors.values()))


def _shown(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
