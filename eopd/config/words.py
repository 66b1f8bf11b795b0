"""Types of config keys in the words of YAML: ``a whole number from 1 to 8, or null``."""

import itertools
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from pydantic.fields import FieldInfo

from eopd.config.document import show
from eopd.config.shape import item_of, kinds_of, may_be_null, members, section_of, short_of

_NAMES: Final = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_MOST_KEYS: Final = 4


def expected(annotation: object, metadata: Iterable[object] = ()) -> str:
    """Says what a type takes; ``metadata`` are bounds that stand beside it."""
    if typing.get_origin(annotation) is typing.Annotated:
        inner, *bounds = typing.get_args(annotation)
        return expected(inner, [*metadata, *bounds])

    if kinds := kinds_of(annotation):
        return listed([f"{{kind: {kind}}}" for kind in kinds], last="or")

    if typing.get_origin(annotation) in (None, typing.Literal, list, tuple, dict, set):
        return _single(annotation, list(metadata))

    parts = [part for part in typing.get_args(annotation) if part is not type(None)]
    words = list(dict.fromkeys(expected(part, metadata) for part in parts))

    return f"{', '.join(words)}, or null" if may_be_null(annotation) else listed(words, last="or")


def listed(words: Sequence[str], last: str = "and") -> str:
    """Joins words as a sentence lists them: ``a, b and c``."""
    return f"{', '.join(words[:-1])} {last} {words[-1]}" if len(words) > 1 else "".join(words)


def literals(annotation: object) -> list[str]:
    """Returns the words that a type names one by one."""
    types = members(annotation)
    choices = [member for member in types if typing.get_origin(member) is typing.Literal]
    return [str(word) for choice in choices for word in typing.get_args(choice)]


def bound_of(metadata: Iterable[object], name: str) -> object:
    """The bound of this name (``ge``, ``pattern``, ...) beside a type, or None; it may stand within
    a ``Field(...)``.
    """
    parts = (part.metadata if isinstance(part, FieldInfo) else [part] for part in metadata)
    bounds = itertools.chain.from_iterable(parts)
    return next((getattr(bound, name) for bound in bounds if hasattr(bound, name)), None)


def _single(annotation: object, metadata: Sequence[object]) -> str:
    if section := section_of(annotation):
        keys = list(section.model_fields)
        more = ", ..." if len(keys) > _MOST_KEYS else ""
        text = "text, or " if short_of(section) else ""
        return f"{text}a mapping of its keys ({', '.join(keys[:_MOST_KEYS])}{more})"

    if (item := item_of(annotation)) is not None:
        return f"a list{_length(annotation, metadata)}, each {expected(item)}"

    if typing.get_origin(annotation) is typing.Literal:
        return listed([show(value) for value in typing.get_args(annotation)], last="or")

    if annotation is dict or typing.get_origin(annotation) is dict:
        numbers = typing.get_args(annotation) == (int, int)
        return f"a mapping of {'whole numbers' if numbers else 'options'}"

    if annotation is set or typing.get_origin(annotation) is set:
        return "a list"

    name = _NAMES.get(
        typing.cast(type, annotation), "a path" if annotation is Path else "another value"
    )

    return name + (_range(metadata) if annotation in (int, float) else "")


def _length(annotation: object, metadata: Sequence[object]) -> str:
    parts = typing.get_args(annotation)
    if typing.get_origin(annotation) is tuple and parts[-1] is not Ellipsis:
        return f" of {len(parts)}"

    return " of at least one" if bound_of(metadata, "min_length") else ""


def _range(metadata: Sequence[object]) -> str:
    least, above = bound_of(metadata, "ge"), bound_of(metadata, "gt")
    most, below = bound_of(metadata, "le"), bound_of(metadata, "lt")
    if least is not None and most is not None:
        return f" from {short(least)} to {short(most)}"

    lower = f" above {short(above)}" if above is not None else ""
    lower = f" of {short(least)} or more" if least is not None else lower
    upper = f" below {short(below)}" if below is not None else ""
    upper = f" at most {short(most)}" if most is not None else upper

    return f"{lower}{',' if lower and upper else ''}{upper}"


def short(value: object) -> str:
    """Returns a number as people write it: ``1e-05``, and 1 for 1.0."""
    return f"{value:g}" if isinstance(value, float) else str(value)
