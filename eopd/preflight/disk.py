"""Whether the disk of a run directory has room for checkpoints, from the sizes in the student's files.

Of P parameters a checkpoint holds the weights in the student's type, AdamW's two moments in float32,
and in half precision float32 masters: 12 P bytes in float32, 14 P in bfloat16. That is the least: what
DeepSpeed stores twice, or adapters store besides, comes on top. Under LoRA it is the weights alone.
"""

import math
import shutil
from collections.abc import Iterator
from pathlib import Path

from eopd.config import Config, ConfigError
from eopd.hub import model_directory
from eopd.preflight.weights import read_tensors


def require_disk(config: Config) -> None:
    """Checks that a checkpoint of the run fits where it will be written.

    Raises:
        ConfigError: not even one does.
    """
    path, least = config.run.path, checkpoint_bytes(config)
    free = _free_bytes(path)
    if free < least:
        raise ConfigError(
            f"run.directory: {_shown(free)} are free where {path} lies, and one checkpoint of this "
            f"student takes {_shown(least)} or more; free some space, or name another disk"
        )


def disk_notes(config: Config) -> Iterator[str]:
    """Yields what the checkpoints of a run need, where that is more than is free: those that are kept,
    and the one that is written before the oldest is removed.
    """
    number, free = config.checkpoint.keep_last + 1, _free_bytes(config.run.path)
    needed = number * checkpoint_bytes(config)
    if free < needed:
        yield (
            f"checkpoint.keep_last: {number} checkpoints, the newest beside those that are kept, take "
            f"{_shown(needed)} or more, and {_shown(free)} are free where {config.run.path} lies"
        )


def checkpoint_bytes(config: Config) -> int:
    """Returns what a checkpoint of the run takes at least; 0 where the student's files do not say."""
    try:
        tensors = read_tensors(model_directory(config.student.model), standard_names=True) or {}
    except (ConfigError, ValueError, OSError):  # whoever reads the weights says so
        return 0

    width = 4 if config.student.chosen_dtype == "float32" else 2
    optimizer = 8 if width == 4 else 12
    of_parameter = width + (0 if config.student.lora is not None else optimizer)
    return of_parameter * sum(math.prod(tensor.shape) for tensor in tensors.values())


def _free_bytes(path: Path) -> int:
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    return shutil.disk_usage(there).free


def _shown(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
