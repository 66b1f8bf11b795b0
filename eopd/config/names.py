"""Models and data sets may be named as on the Hugging Face Hub, in place of a path. Names are only
read here; ``eopd.hub`` looks them up.
"""

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final, Self

_WORD: Final = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
# ``models/`` is where people keep directories: a misspelt one must not become a stranger's model
_MODEL: Final = re.compile(rf"(?!models/)({_WORD}/{_WORD})(?:@([^\s@:\0]+))?")
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
# a colon between the parts of a data set's name, but not that of the slice in ``train[:100]``
_COLON: Final = re.compile(r":(?![^\[]*\])")


def is_commit(revision: str | None) -> bool:
    """Tells whether a revision is a whole commit, which never moves."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def shown(spec: str) -> str:
    """Returns a model or a data set for others to read: its name, or the last part of its path, since
    paths tell of machines and users.
    """
    return PurePosixPath(spec).name if spec.startswith(("/", "…")) else spec


@dataclass(frozen=True, slots=True)
class ModelName:
    """The name of a model: ``OWNER/NAME``, and a branch, a tag or a commit, if one is named."""

    repository: str
    revision: str | None = None

    @classmethod
    def parse(cls, spec: str) -> Self | None:
        """Reads ``OWNER/NAME`` or ``OWNER/NAME@REVISION``; anything else is a path, and None.

        ``ModelName.parse("Qwen/Qwen3-8B@main")`` is ``ModelName("Qwen/Qwen3-8B", "main")``.
        """
        match = _MODEL.fullmatch(spec)
        return cls(match[1], match[2]) if match else None

    def __str__(self) -> str:
        return self.repository + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True, slots=True)
class DataName:
    """The name of a data set: ``NAME@REVISION:SUBSET:SPLIT``, of which only the name is needed.

    ``parts`` are subset and split as they were written: both, the split alone, or none.
    """

    repository: str
    revision: str | None = None
    parts: tuple[str, ...] = ()

    @classmethod
    def parse(cls, spec: str) -> Self:
        """Reads a name, such as ``openai/gsm8k@main:main:train``.

        Raises:
            ValueError: it has too many parts, or an empty one.
        """
        name, *parts = _COLON.split(spec)
        repository, at, revision = name.partition("@")
        if len(parts) > 2 or not all((repository, *parts)) or (at and not revision):
            raise ValueError(
                f"{spec} must be NAME, NAME:SPLIT or NAME:SUBSET:SPLIT; a revision stands "
                "behind the name, as in NAME@REVISION"
            )

        return cls(repository, revision or None, tuple(parts))

    @property
    def subset(self) -> str | None:
        """The subset, where one is named."""
        return self.parts[0] if len(self.parts) == 2 else None

    @property
    def split(self) -> str:
        """The split; ``train`` where none is named."""
        return self.parts[-1] if self.parts else "train"

    def __str__(self) -> str:
        name = self.repository + (f"@{self.revision}" if self.revision else "")
        return ":".join((name, *self.parts))
