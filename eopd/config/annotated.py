"""A resolved config is written with the origin of every value as a comment behind it.

    learner:
      lr: 1.0e-05           # --set
      schedule: constant    # configs/mine.yaml:12
      zero_stage: 0         # chosen: the fastest on one rank in float32
      betas:
      - 0.9                 # default

The text is YAML that loads as the same config.
"""

from collections.abc import Iterator, Mapping
from typing import Final

from eopd.config.document import read_document
from eopd.config.load import Loaded, dump_config
from eopd.config.shape import Place
from eopd.config.written import Origins

_COLUMN: Final = 40  # where comments begin, unless a line is longer
_CHOSEN: Final = "auto: "  # begins every reason of a choice
_DEFAULT: Final = "default"


def annotate(loaded: Loaded) -> str:
    """Writes a config as ``dump_config`` does, with the origin of each value as a comment."""
    text = dump_config(loaded.config)
    rows = text.split("\n")
    _, lines = read_document(text)

    for place, comment in _comments(loaded.config.model_dump(), loaded.origins, ()):
        row = lines[place] - 1
        printable = "".join(mark if mark.isprintable() else " " for mark in comment)
        rows[row] = f"{rows[row]:<{_COLUMN}}  # {printable}"

    return "\n".join(rows)


def _comments(tree: object, origins: Origins, place: Place) -> Iterator[tuple[Place, str]]:
    """Yields the places of the values below one, each with its comment."""
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            inner = (*place, str(key))
            if reason := _reason(tree, str(key), origins, place):
                yield inner, reason
            else:
                yield from _comments(value, origins, inner)
    elif isinstance(tree, list | tuple) and tree:
        for index, value in enumerate(tree):
            yield from _comments(value, origins, (*place, str(index)))
    else:
        yield place, _origin(tree, origins, place)


def _reason(
    section: Mapping[object, object], key: str, origins: Origins, place: Place
) -> str | None:
    """Returns the comment on a value that was chosen now, and on the key that says why."""
    owner = key.removesuffix("_reason")
    reason = section.get(f"{owner}_reason")
    if not isinstance(reason, str) or (*place, f"{owner}_reason") in origins:
        return None

    return "chosen" if key != owner else f"chosen: {reason.removeprefix(_CHOSEN)}"


def _origin(value: object, origins: Origins, place: Place) -> str:
    """Returns the origin of a value: its own, or that of the text that stands for its section."""
    if place in origins:
        return origins[place]

    is_said = value is not None and value != {}
    texts = (origins[place[:-up]] for up in (1, 2) if place[:-up] in origins)
    return next(texts, _DEFAULT) if is_said else _DEFAULT
