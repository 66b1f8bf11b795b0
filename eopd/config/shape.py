"""From the tree of a document to the values that a section wants: every scalar by the key it is
for.

Short forms become whole ones where they can mean one thing: ``gate: hard`` is ``{kind: hard}``, a
text is the key that a section is ``short`` for, one item is a list of one, an empty section has its
defaults, one without its ``kind`` the usual one. What cannot be read is left as it stands, for
pydantic to refuse; what can be read in two ways is a fault of its own.
"""

import types
import typing
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from eopd.config.base import Section
from eopd.config.scalars import (
    NULLS,
    OLD_TRUTHS,
    TRUTHS,
    Plain,
    cut_short,
    meant_number,
    native,
    number,
    two_readings,
    unclear,
)

Place = tuple[str, ...]
Faults = dict[Place, str]


def members(annotation: object) -> tuple[object, ...]:
    """Returns the types of a union but None, without their annotations; else the type alone."""
    if typing.get_origin(annotation) is typing.Annotated:
        return members(typing.get_args(annotation)[0])

    if typing.get_origin(annotation) not in (typing.Union, types.UnionType):
        return (annotation,)

    parts = [part for part in typing.get_args(annotation) if part is not types.NoneType]
    return tuple(member for part in parts for member in members(part))


def may_be_null(annotation: object) -> bool:
    """Returns whether a type takes null."""
    if typing.get_origin(annotation) is typing.Annotated:
        return may_be_null(typing.get_args(annotation)[0])

    return types.NoneType in typing.get_args(annotation)


def section_of(annotation: object) -> type[BaseModel] | None:
    """Returns the section that a type is, if it is a single one."""
    (first, *more) = members(annotation)
    if more or not isinstance(first, type) or isinstance(first, types.GenericAlias):
        return None

    return first if issubclass(first, BaseModel) else None


def short_of(section: type[BaseModel]) -> str | None:
    """Returns the key of a section that a bare text in its place stands for, if there is one."""
    return section.short if issubclass(section, Section) else None


def kinds_of(annotation: object) -> dict[str, type[BaseModel]]:
    """Returns the sections of a union by their ``kind``; none of a type that is no such union."""
    sections = [section_of(member) for member in members(annotation)]
    forms = [section for section in sections if section and "kind" in section.model_fields]
    if len(forms) < 2:
        return {}

    kinds = (typing.get_args(form.model_fields["kind"].annotation)[0] for form in forms)
    return dict(zip(kinds, forms, strict=True))


def item_of(annotation: object) -> object | None:
    """Returns the type of a list's items, or None if a type is no list; tuples are lists of YAML."""
    (only, *more) = members(annotation)
    if more or typing.get_origin(only) not in (tuple, list):
        return None

    return typing.cast(object, typing.get_args(only)[0])


def shape(tree: object, model: type[BaseModel], *, is_whole: bool = True) -> tuple[object, Faults]:
    """Returns the tree with values in the place of scalars, and the faults by place: what can be
    read in two ways.

    Args:
        tree: what was written.
        model: the section that it is.
        is_whole: false where it will lie over another tree, which may name the ``kind`` of a
            section that has none here. Then none is filled in.
    """
    shaper = _Shaper(is_whole)
    return shaper.section(tree, model, ()), shaper.faults


class _Shaper:
    def __init__(self, is_whole: bool) -> None:
        self.faults: Faults = {}
        self._is_whole = is_whole

    def section(self, tree: object, model: type[BaseModel], place: Place) -> object:
        if not isinstance(tree, Mapping):
            return tree

        shaped: dict[str, object] = {}

        for key, value in tree.items():
            field = model.model_fields.get(key)
            key_place = (*place, str(key))
            if field is None:
                shaped[str(key)] = value
            elif not _stands_for_default(value, field):
                usual = getattr(field.default, "kind", None)
                shaped[str(key)] = self._value(value, field.annotation, key_place, usual)

        return shaped

    def _value(
        self, value: object, annotation: object, place: Place, default_kind: str | None = None
    ) -> object:
        if isinstance(value, Plain) and str in members(annotation) and (reason := cut_short(value)):
            self.faults[place] = reason
            return value

        is_null = isinstance(value, Plain) and value in NULLS and may_be_null(annotation)
        if value is None or is_null:
            return None

        if kinds := kinds_of(annotation):
            return self._union(value, kinds, place, default_kind)

        if section := section_of(annotation):
            return self._single_section(value, section, annotation, place)

        if (item := item_of(annotation)) is not None:
            return self._list(value, item, place)

        (single, *_) = members(annotation)
        if typing.get_origin(single) is dict:
            return self._mapping(value, typing.get_args(single), place)

        return self._scalar(value, annotation, place) if isinstance(value, Plain) else value

    def _union(
        self,
        value: object,
        kinds: Mapping[str, type[BaseModel]],
        place: Place,
        default_kind: str | None,
    ) -> object:
        """Reads one of several sections; without a ``kind`` it is the ``default_kind``, if that
        has all of its keys.
        """
        if isinstance(value, str) and value not in NULLS:
            return {"kind": str(value)}

        if not isinstance(value, Mapping):
            return None if isinstance(value, Plain) else value

        if (
            self._is_whole
            and default_kind is not None
            and "kind" not in value
            and value.keys() <= kinds[default_kind].model_fields.keys()
        ):
            value = {"kind": default_kind, **value}

        section = kinds.get(str(value.get("kind")))
        if section is not None:
            return self.section(value, section, place)

        return dict(value) | ({"kind": str(value["kind"])} if "kind" in value else {})

    def _single_section(
        self, value: object, section: type[BaseModel], annotation: object, place: Place
    ) -> object:
        if isinstance(value, Plain) and value in NULLS:
            return {}

        truths = TRUTHS | OLD_TRUTHS
        if isinstance(value, Plain) and value in truths and may_be_null(annotation):
            return {} if truths[value] else None

        if isinstance(value, str) and (key := short_of(section)):
            value = {key: value}

        return self.section(value, section, place)

    def _list(self, value: object, item: object, place: Place) -> object:
        if isinstance(value, Plain) and value in NULLS:
            return []

        section = section_of(item)
        if isinstance(value, str) and section and short_of(section):
            return self._value(value, str, place)

        if isinstance(value, Mapping) and section is None:
            return value

        items = value if isinstance(value, list | tuple) else [value]
        return [self._value(part, item, (*place, str(index))) for index, part in enumerate(items)]

    def _mapping(self, value: object, types_: tuple[object, ...], place: Place) -> object:
        if isinstance(value, Plain) and value in NULLS:
            return {}

        if types_ == (str, object):
            return self._native(value, place) if isinstance(value, Mapping) else value

        if not isinstance(value, Mapping):
            return value

        key_type, value_type = types_
        shaped: dict[object, object] = {}

        for key, entry in value.items():
            key_place = (*place, str(key))
            name = self._scalar(key, key_type, key_place) if isinstance(key, Plain) else key
            if name in shaped:
                self.faults[key_place] = "stands twice, written in two ways"
                return value

            shaped[name] = self._value(entry, value_type, key_place)

        return shaped

    def _native(self, value: object, place: Place) -> object:
        """An option that somebody else reads: what is not quoted must be clear by itself."""
        if isinstance(value, Mapping):
            items = value.items()
            return {_key(key): self._native(entry, (*place, str(key))) for key, entry in items}

        if isinstance(value, list):
            return [self._native(item, (*place, str(i))) for i, item in enumerate(value)]

        if not isinstance(value, Plain):
            return value

        option = native(value)
        if reason := unclear(value) or (cut_short(value) if isinstance(option, str) else None):
            self.faults[place] = reason
            return value

        if isinstance(option, float) and not abs(option) < float("inf"):
            self.faults[place] = f"must be a finite number (is {value})"
            return value

        return option

    def _scalar(self, value: Plain, annotation: object, place: Place) -> object:
        (single, *_) = members(annotation)
        if value in NULLS:
            return None

        if single is str and may_be_null(annotation) and value.lower() == "none":
            self.faults[place] = f"{value} is text in YAML: write null, or '{value}' in quotes"
            return value

        if single is bool:
            return (TRUTHS | OLD_TRUTHS).get(value, value)

        if single in (int, float) or _is_literal_with_numbers(single):
            if reason := two_readings(value):
                self.faults[place] = reason
                return value

            quantity = meant_number(value)
            return value if quantity is None else quantity

        return str(value) if single in (str, Path) else value


def _stands_for_default(value: object, field: FieldInfo) -> bool:
    """Whether a section of several kinds stands there without a value, which leaves the default in
    place.
    """
    return isinstance(value, Plain) and value == "" and bool(kinds_of(field.annotation))


def _is_literal_with_numbers(annotation: object) -> bool:
    words = typing.get_args(annotation)
    is_literal = typing.get_origin(annotation) is typing.Literal
    return is_literal and any(isinstance(word, int) for word in words)


def _key(key: object) -> object:
    """A key of a native option: a whole number or text."""
    if not isinstance(key, Plain):
        return key

    index = number(key)
    return index if isinstance(index, int) else str(key)
