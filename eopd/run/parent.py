"""``parent.json`` says of which run, and of which of its steps, another one is a fork."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

from pydantic import TypeAdapter

from eopd.config.saved import read_saved
from eopd.run.storage import write_whole

PARENT: Final = "parent.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parent:
    """The run that a fork goes on from.

    Args:
        run: its directory, at the time of the fork.
        name: its name.
        step: the step of the checkpoint that the fork began with.
        fresh_optimizer: whether the optimiser's moments began at zero there.
        changes: each key that the fork changed, with its value before and after.
        time: of the fork, in seconds since 1970.
    """

    run: str
    name: str
    step: int
    fresh_optimizer: bool = False
    changes: Mapping[str, Sequence[object]] = field(default_factory=dict)
    time: float = 0.0

    def write(self, directory: Path) -> None:
        """Writes the file into the directory of the fork."""
        write_whole(directory / PARENT, json.dumps(asdict(self), indent=1) + "\n")


def read_parent(directory: Path) -> Parent | None:
    """Returns the parent of a run; None of a run that is no fork.

    Raises:
        ConfigError: the file is damaged.
    """
    path = directory / PARENT
    if not path.exists():
        return None

    return read_saved(path, TypeAdapter(Parent), f"Remove {PARENT} to go on without it")


def forgets_moments_at(directory: Path, step: int) -> bool:
    """Tells whether the run goes on from the checkpoint of a step with a fresh optimiser: from that
    one with which it began, and was told so.
    """
    parent = read_parent(directory)
    return parent is not None and parent.fresh_optimizer and parent.step == step
