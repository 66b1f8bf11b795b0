"""What a user wrote of a run: the files of a chain, each over the one before it, then ``--set``.

    file ─ extended by ─▶ file ─ overridden by ─▶ --set ─▶ one tree in long form, and its origins

Mappings are merged key by key; a list or a value replaces what was there, and so does a mapping of
another ``kind``. The short forms of a file are written out before it is merged, so that each means
there what it means alone. Every value keeps its origin, for messages and for ``eopd config show``.
"""

import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from eopd.config.chain import ConfigFile
from eopd.config.overrides import apply_override
from eopd.config.root import Config
from eopd.config.shape import Place, shape

_REASON: Final = "_reason"  # ends the key that says why a value was chosen


Origins = Mapping[Place, str]  # where each value was written: FILE:LINE, or an option
SET: Final = "--set"


@dataclass(frozen=True, slots=True)
class Written:
    """The settings that were written, in long form, and the origin of each value by its place."""

    tree: dict[str, object]
    origins: Origins

    @classmethod
    def of(cls, tree: Mapping[str, object], origins: Origins) -> typing.Self:
        """Writes out the short forms of a tree, and keeps the origins of what is in it."""
        expanded = typing.cast(dict[str, object], shape(tree, Config)[0])
        places = leaves(expanded)
        return cls(expanded, {place: origins[place] for place in places if place in origins})

    @classmethod
    def in_files(cls, files: Sequence[ConfigFile]) -> typing.Self:
        """Lays the files of a chain over one another, in their order."""
        written = cls({}, {})
        for file in files:
            written = written._extended(file)

        return written

    def _extended(self, file: ConfigFile) -> typing.Self:
        above, _ = shape(file.tree, Config, is_whole=False)
        own = {place: _origin(file, place) for place in leaves(above)}
        merged = _merged(self.tree, typing.cast(dict[str, object], above))
        return self.of(merged, {**self.origins, **own})

    def overridden(self, override: str) -> typing.Self:
        """Applies an override ``a.b=c``.

        Raises:
            ConfigError: it has no key and value, or a part of its key leads nowhere.
        """
        place = apply_override(self.tree, override)
        expanded = self.of(self.tree, self.origins)
        own = {leaf: SET for leaf in leaves(expanded.tree) if leaf[: len(place)] == place}

        return type(self)(expanded.tree, {**expanded.origins, **own})


def leaves(tree: object, place: Place = ()) -> Iterator[Place]:
    """Yields the places of all values of a tree, and of lists that are empty."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from leaves(value, (*place, str(key)))
    elif isinstance(tree, list) and tree:
        for index, value in enumerate(tree):
            yield from leaves(value, (*place, str(index)))
    else:
        yield place


def _origin(file: ConfigFile, place: Place) -> str:
    """Returns where a value stands in a file. What a short form stands for is where that stands."""
    depths = range(len(place), 0, -1)
    line = next(file.lines[place[:depth]] for depth in depths if place[:depth] in file.lines)
    return f"{file.path}:{line}"


def _merged(below: Mapping[str, object], above: Mapping[str, object]) -> dict[str, object]:
    """Lays one mapping over another. The reason of a value that was chosen goes with the value."""
    merged = {
        key: value
        for key, value in below.items()
        if not (str(key).endswith(_REASON) and str(key).removesuffix(_REASON) in above)
    }
    for key, value in above.items():
        other = merged.get(key)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            is_other_kind = "kind" in value and value["kind"] != other.get("kind")
            merged[key] = value if is_other_kind else _merged(other, value)
        else:
            merged[key] = value

    return merged
