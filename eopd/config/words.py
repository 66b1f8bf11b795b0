"""Types of config keys in the words of YAML: ``a whole number from 1 to 8, or null``."""

import itertools
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from pydantic.fields import FieldInfo

from eopd.config.document import show
from eopd.config.shape import item_of, kinds_of, may_be_null, members, section_of

_NAMES: Final = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_MOST_KEYS: Final = 4


def expected(annotation: object, metadata: Iterable[object] = ()) -> str:
    """What a type takes; ``metadata`` are bounds that stand beside it."""
    if typing.get_origin(annotation) is typing.Annotated:
        inner, *more = typing.get_args(annotation)
        return expected(inner, [*metadata, *more])

    if kinds := kinds_of(annotation):
        return listed([f"{{kind: {kind}}}" for kind in kinds], last="or")

    if typing.get_origin(annotation) in (None, typing.Literal, list, tuple, dict, set):
        return _one(annotation, list(metadata))

    parts = [part for part in typing.get_args(annotation) if part is not type(None)]
    words = list(dict.fromkeys(expected(part, metadata) for part in parts))

    return f"{', '.join(words)}, or null" if may_be_null(annotation) else listed(words, last="or")


def listed(words: Sequence[str], last: str = "and") -> str:
    """``a, b and c``."""
    return f"{', '.join(words[:-1])} {last} {words[-1]}" if len(words) > 1 else "".join(words)


def literals(annotation: object) -> list[str]:
    """The words that a type names one by one."""
    found = [one for one in members(annotation) if typing.get_origin(one) is typing.Literal]
    return [str(word) for literal in found for word in typing.get_args(literal)]


def bound_of(metadata: Iterable[object], name: str) -> object:
    """The bound of this name (``ge``, ``pattern``, ...) beside a type, or None; it may stand within
    a ``Field(...)``.
    """
    parts = (part.metadata if isinstance(part, FieldInfo) else [part] for part in metadata)
    bounds = itertools.chain.from_iterable(parts)
    return next((getattr(bound, name) for bound in bounds if hasattr(bound, name)), None)


def _one(wanted: object, metadata: Sequence[object]) -> str:
    if section := section_of(wanted):
        keys = list(section.model_fields)
        more = ", ..." if len(keys) > _MOST_KEYS else ""
        return f"a mapping of its keys ({', '.join(keys[:_MOST_KEYS])}{more})"

    if (item := item_of(wanted)) is not None:
        return f"a list{_length(wanted, metadata)}, each {expected(item)}"

    if typing.get_origin(wanted) is typing.Literal:
        return listed([show(value) for value in typing.get_args(wanted)], last="or")

    if wanted is dict or typing.get_origin(wanted) is dict:
        numbers = typing.get_args(wanted) == (int, int)
        return f"a mapping of {'whole numbers' if numbers else 'options'}"

    if wanted is set or typing.get_origin(wanted) is set:
        return "a list"

    name = _NAMES.get(typing.cast(type, wanted), "a path" if wanted is Path else "another value")

    return name + (_range(metadata) if wanted in (int, float) else "")


def _length(wanted: object, metadata: Sequence[object]) -> str:
    parts = typing.get_args(wanted)
    if typing.get_origin(wanted) is tuple and parts[-1] is not Ellipsis:
        return f" of {len(parts)}"

    return " of at least one" if bound_of(metadata, "min_length") else ""


def _range(metadata: Sequence[object]) -> str:
    least, above = bound_of(metadata, "ge"), bound_of(metadata, "gt")
    most, below = bound_of(metadata, "le"), bound_of(metadata, "lt")
    if least is not None and most is not None:
        return f" from {_short(least)} to {_short(most)}"

    lower = f" above {_short(above)}" if above is not None else ""
    lower = f" of {_short(least)} or more" if least is not None else lower
    upper = f" below {_short(below)}" if below is not None else ""
    upper = f" at most {_short(most)}" if most is not None else upper

    return f"{lower}{',' if lower and upper else ''}{upper}"


def _short(bound: object) -> str:
    return f"{bound:g}" if isinstance(bound, float) else str(bound)
