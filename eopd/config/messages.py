"""What pydantic found wrong, in the words of YAML: the key, the value, and what may stand there."""

import difflib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from eopd.config.document import show
from eopd.config.shape import Place, item_of, kinds_of, members, section_of
from eopd.config.words import expected, listed, literals

_MOST_PLACES: Final = 3
_MOST_LISTED: Final = 40
_KEY: Final = "[key]"  # pydantic's word for the key of a mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class _Spot:
    """Where a mistake is: its place for the user, the section around it, the field, and the type
    there.

    ``inside`` says where within the field, if that is a list or mapping of values; ``siblings`` are
    the kinds that the section is one of.
    """

    place: Place
    owner: type[BaseModel]
    field: FieldInfo | None
    inside: Place
    annotation: object
    siblings: Mapping[str, type[BaseModel]]

    @property
    def key(self) -> str:
        return ".".join(self.place)

    @property
    def kinds(self) -> list[str]:
        return list(kinds_of(self.annotation))


def explain(detail: ErrorDetails, model: type[BaseModel]) -> tuple[Place, str]:
    """Finds the place of a mistake in the user's tree, and writes one line about it."""
    location = [str(part) for part in detail["loc"]]
    is_key = location[-1:] == [_KEY] and detail["type"] != "extra_forbidden"
    spot = _find(model, location[:-1] if is_key else location)
    value, key = detail["input"], spot.key

    match detail["type"]:
        case "missing" if spot.inside:  # one of a list of so many
            spot = _find(model, spot.place[:-1])
            line = f"{spot.key}: {_mismatch(spot, value)}"
        case "missing":
            line = f"{key}: is required"
        case "extra_forbidden":
            line = f"{key}: {_of_another_kind(spot) or f'unknown key; {_hint(model, spot)}'}"
        case "value_error":
            line = _joined(spot, detail["msg"].removeprefix("Value error, "))
        case "union_tag_not_found" if isinstance(value, Mapping):
            line = f"{key}.kind: is required; {_kinds_with(spot, value)}"
        case "union_tag_invalid":
            kind = str(value["kind"])
            line = (
                f"{key}.kind: {kind} is unknown; {_close(kind, spot.kinds)}kinds are "
                f"{listed(spot.kinds)}"
            )
        case _ if is_key:
            expectation = (
                f"text here: write '{value}' in quotes"
                if detail["type"] == "string_type"
                else "whole numbers here"
            )
            line = f"{key}: keys must be {expectation}"
        case "string_too_long":
            line = (
                f"{key}: must have {detail['ctx']['max_length']} characters at most (has "
                f"{len(value)})"
            )
        case _:
            line = f"{key}: {_mismatch(spot, value)}"

    return spot.place, line


def wrong_option(detail: ErrorDetails) -> str:
    """Writes one line about the value of an option of the command line."""
    bounds = detail.get("ctx", {})
    match detail["type"]:
        case "int_parsing" | "int_parsing_size" | "int_from_float":
            expectation = "must be a whole number"
        case "float_parsing" | "finite_number":
            expectation = "must be a number"
        case "greater_than_equal":
            expectation = f"must be {bounds['ge']} or more"
        case "less_than_equal":
            expectation = f"must be {bounds['le']} or less"
        case _:
            return detail["msg"].removeprefix("Value error, ").removesuffix(".")

    return f"{expectation} (is {detail['input']})"


def _mismatch(spot: _Spot, value: object) -> str:
    if not spot.place:
        return f"must be a mapping of sections (is {show(value)})"

    words = spot.field.description if spot.field and not spot.inside else None
    bounds = spot.field.metadata if spot.field and not spot.inside else ()
    expectation = words or expected(spot.annotation, bounds)
    contents = "" if _may_be_secret(spot.place[-1], value) else f" (is {show(value)})"
    hint = _close(value, literals(spot.annotation)) if isinstance(value, str) else ""

    return f"must be {expectation}{contents}{'; ' if hint else ''}{hint.strip()}"


def _may_be_secret(name: str, value: object) -> bool:
    """Whether somebody may have written a key where its variable or a server's address belongs."""
    return name == "api_key_env" or (name == "url" and any(mark in str(value) for mark in "@?"))


def _inside(annotation: object) -> object:
    """Returns the type of a list's items or of a mapping's values."""
    inner = typing.get_args(members(annotation)[0])
    item = item_of(annotation)
    return (inner[-1] if inner else object) if item is None else item


def _close(word: str, known: Sequence[str]) -> str:
    matches = difflib.get_close_matches(word.lower(), known, n=1)
    return f"did you mean {matches[0]}? " if matches else ""


def _find(model: type[BaseModel], location: Sequence[str]) -> _Spot:
    """Follow pydantic's location, without the members of unions that it names: the user wrote
    none.
    """
    owner, field, place, inside = model, None, list[str](), list[str]()
    annotation: object = model
    siblings: Mapping[str, type[BaseModel]] = {}

    for part in location:
        if part in (kinds := kinds_of(annotation)):
            annotation, siblings = kinds[part], kinds
            continue

        if len(members(annotation)) > 1:
            break

        place.append(part)
        if section := section_of(annotation):
            siblings = siblings if section in siblings.values() else {}
            owner, field, inside = section, section.model_fields.get(part), []
            annotation = field.annotation if field else object
        else:
            inside.append(part)
            annotation = _inside(annotation)

    return _Spot(
        place=tuple(place),
        owner=section_of(annotation) or owner,
        field=field,
        inside=tuple(inside),
        annotation=annotation,
        siblings=siblings,
    )


def _joined(spot: _Spot, message: str) -> str:
    """``key.name: ...`` where the message of a section begins with a key of its own."""
    first = message.partition(":")[0].partition(".")[0]
    if not spot.place:
        return message

    return f"{spot.key}.{message}" if first in spot.owner.model_fields else f"{spot.key}: {message}"


def _hint(model: type[BaseModel], spot: _Spot) -> str:
    """Returns a hint at what an unknown key may mean: one close by, or the same one elsewhere."""
    name = spot.place[-1]
    if "." in name:
        section, _, key = name.partition(".")
        return f"names with dots are for --set; here write {section}: {{{key}: ...}}"

    allowed = sorted(spot.owner.model_fields)
    if hint := _close(name.replace("-", "_"), allowed):
        return hint.strip()

    namesakes = [key for key in _every_key(model) if key.rpartition(".")[2] == name]
    if 0 < len(namesakes) <= _MOST_PLACES:
        return f"did you mean {listed(namesakes, last='or')}?"

    return (
        f"allowed here: {', '.join(allowed)}"
        if len(allowed) <= _MOST_LISTED
        else "no known key is like it"
    )


def _of_another_kind(spot: _Spot) -> str | None:
    """Returns a message about a key that other kinds of the section have."""
    kinds = [
        kind for kind, section in spot.siblings.items() if spot.place[-1] in section.model_fields
    ]
    if not kinds:
        return None

    current = spot.owner.model_fields["kind"].default
    plural = "s" if len(kinds) > 1 else ""
    return (
        f"is of kind{plural} {listed(kinds)}, and kind is {current}; leave it out, or change kind"
    )


def _kinds_with(spot: _Spot, mapping: Mapping[str, object]) -> str:
    """Names the kinds that have the keys of a mapping, or else all."""
    forms = kinds_of(spot.annotation)
    keys = mapping.keys()
    kinds = [kind for kind, section in forms.items() if keys <= section.model_fields.keys()]
    if not kinds:
        return f"kinds are {listed(list(forms))}"

    verb = "are" if len(keys) > 1 else "is"
    return f"{listed(list(keys))} {verb} of kind {listed(kinds, last='or')}"


def _every_key(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, field in model.model_fields.items():
        item = item_of(field.annotation)
        sections = [section_of(field.annotation if item is None else item)]
        sections = list(kinds_of(field.annotation).values()) or sections
        key = f"{prefix}{name}" + ("[]" if item is not None and sections[0] else "")
        for section in sections:
            keys += _every_key(section, f"{key}.") if section else [key]

    return list(dict.fromkeys(keys))
