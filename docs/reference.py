"""Make ``configuration-reference.md`` and ``configs/schema.json`` from the config sections:
``make reference``.

Both say what ``eopd/config`` says: names, types, bounds and defaults of the fields, the docstrings
of the sections, and the text beneath each field. ``eopd.config.shape`` knows which short forms a
config may have; the schema takes them as it does.
"""

import ast
import inspect
import itertools
import json
import re
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Final

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from eopd.config import Config
from eopd.config.chain import EXTENDS as EXTENDS_KEY
from eopd.config.document import show
from eopd.config.shape import item_of, kinds_of, may_be_null, section_of, short_of
from eopd.config.words import bound_of, expected, listed, literals

ROOT: Final = Path(__file__).parents[1]
PAGE: Final = "docs/configuration-reference.md"
SCHEMA: Final = "configs/schema.json"

Section = type[BaseModel]
Json = dict[str, object]

# --- what the sections say -----------------------------------------------------------------------


def prose(docstring: str | None) -> str:
    """Returns the text of a docstring as Markdown, with a line for each paragraph."""
    paragraphs = inspect.cleandoc(docstring or "").replace("``", "`").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def descriptions(section: Section) -> dict[str, str]:
    """Returns the description of every field of a section, by name: the text beneath it. That of a
    ``kind`` is the docstring of its section.
    """
    texts = {"kind": prose(section.__doc__)} if "kind" in section.model_fields else {}
    for base in reversed(section.__mro__):
        if issubclass(base, BaseModel) and base.model_fields:
            texts |= own_descriptions(base)

    return texts


def own_descriptions(section: Section) -> dict[str, str]:
    """Returns the descriptions of the fields that a section has beside those that it inherits."""
    (definition,) = ast.parse(inspect.getsource(section)).body
    assert isinstance(definition, ast.ClassDef)
    texts: dict[str, str] = {}

    for field, text in itertools.pairwise(definition.body):
        match field, text:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(words))),
            ):
                texts[name] = prose(words)

    return texts


def default_kind_of(field: FieldInfo) -> str | None:
    """Returns the ``kind`` of the form that is the default of a field, if it has forms."""
    return typing.cast(str | None, getattr(field.default, "kind", None))


# --- the page ------------------------------------------------------------------------------------

HEAD: Final = """\
# Configuration reference

<!-- Made by `make reference` from the fields of eopd/config/*.py; edit those. -->

Every key of a config, by section. [configuration.md](configuration.md) says how a config is
written and read, and has a chapter for each topic that needs more than a line.
`eopd config show CONFIG` prints a config with every default, and where each value was written.
Besides sections a file may have `extends`, which
[lays it over another one](configuration.md#a-config-that-extends-another).
"""


@dataclass(frozen=True)
class Chapter:
    """A part of the page: a section below its dotted name, or the several forms of one key."""

    name: str
    intro: str
    forms: dict[str, Section]  # by kind; a section that has none stands below the empty text
    default_kind: str | None = None


def page_text() -> str:
    """Writes the reference page."""
    texts = descriptions(Config)
    rows = [
        f"| [`{name}`](#{anchor(name)}) | {'yes' if field.is_required() else 'no'} | {texts[name]} |"
        for name, field in Config.model_fields.items()
    ]
    parts = [HEAD, table("section | required | what it sets", rows)]
    parts += [part(chapter) for chapter in chapters(Config)]

    return "\n".join(parts)


def chapters(section: Section, prefix: str = "") -> Iterator[Chapter]:
    """Yields the chapters of the sections within a section, each before those within it."""
    for name, field in section.model_fields.items():
        item = item_of(field.annotation)
        inner = section_of(item or field.annotation)
        key = f"{prefix}{name}" + ("[]" if inner and item else "")

        if kinds := kinds_of(field.annotation):
            yield Chapter(key, descriptions(section)[name], kinds, default_kind_of(field))
        elif inner:
            yield Chapter(key, prose(inner.__doc__), {"": inner})

        for form in kinds.values() or filter(None, [inner]):
            yield from chapters(form, f"{key}.")


def part(chapter: Chapter) -> str:
    """Writes a chapter: its heading, what it is, its forms, and its keys."""
    blocks = [f"## `{chapter.name}`\n", f"{linked(chapter.intro)}\n"]
    if "" not in chapter.forms:
        forms = [
            f"| `{kind}`{' (default)' if kind == chapter.default_kind else ''} | {prose(form.__doc__)} |"
            for kind, form in chapter.forms.items()
        ]
        blocks.append(table(f"`{chapter.name}.kind` | meaning", forms))

    keys = [row for kind, form in chapter.forms.items() for row in key_rows(chapter, kind, form)]
    if keys:
        blocks.append(table("key | takes | default | meaning", keys))

    return "\n".join(blocks)


def key_rows(chapter: Chapter, kind: str, form: Section) -> list[str]:
    """Writes a row for every key of a section; those of one of several forms say of which."""
    texts = descriptions(form)
    suffix = f" (`{kind}`)" if kind else ""
    rows: list[str] = []

    for name, field in form.model_fields.items():
        if name != "kind":
            key = f"{chapter.name}.{name}"
            text = linked(texts[name])
            rows.append(f"| `{key}`{suffix} | {takes(key, field)} | {default_of(field)} | {text} |")

    return rows


def takes(key: str, field: FieldInfo) -> str:
    """Says what may stand at a key; a section has a chapter of its own."""
    if kinds_of(field.annotation):
        return f"[a form](#{anchor(key)})"

    if section_of(field.annotation):
        null = ", or null" if may_be_null(field.annotation) else ""
        return f"[a section](#{anchor(key)}){null}"

    if typing.get_origin(field.annotation) is typing.Literal:
        return listed([f"`{word}`" for word in literals(field.annotation)], last="or")

    return field.description or expected(field.annotation, field.metadata)


def default_of(field: FieldInfo) -> str:
    """Writes the default of a field as YAML, or that it is required."""
    if field.is_required():
        return "required"

    default = field.default
    return f"`{show(default.model_dump() if isinstance(default, BaseModel) else default)}`"


def linked(text: str) -> str:
    """Makes links of the pages of the documentation that a text names."""

    def link(match: re.Match[str]) -> str:
        file, chapter = match.groups()
        name = chapter.replace("-", " ").capitalize() if chapter else file
        return f"[{name}]({file}{f'#{chapter}' if chapter else ''})"

    return re.sub(r"\bdocs/([\w-]+\.md)(?:#([\w-]+))?", link, text)


def anchor(name: str) -> str:
    """Returns the anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", name.lower())


def table(header: str, rows: list[str]) -> str:
    """Writes a table."""
    columns = header.count(" | ") + 1
    return "\n".join([f"| {header} |", "|" + "---|" * columns, *rows, ""])


# --- the schema ----------------------------------------------------------------------------------

# The draft that the YAML language server supports. A number where text is wanted is text.
DRAFT: Final = "http://json-schema.org/draft-07/schema#"
SCALARS: Final[dict[object, Json]] = {
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": ["string", "number", "boolean"]},
    Path: {"type": ["string", "number", "boolean"]},
}
KEYWORDS: Final = {
    "ge": "minimum",
    "gt": "exclusiveMinimum",
    "le": "maximum",
    "lt": "exclusiveMaximum",
    "pattern": "pattern",
}
LENGTHS: Final = {"min_length": "min{}", "max_length": "max{}"}
NUMBERS: Final[Json] = {
    "propertyNames": {"pattern": "^-?[0-9]+$"},
    "additionalProperties": {"type": "integer"},
}


EXTENDS: Final[Json] = {
    "description": "Another config file, by its path from the folder of this one. What stands here "
    "lies over it: mappings are merged key by key, lists and values replaced.",
    "type": "string",
    "minLength": 1,
}


def schema_text() -> str:
    """Writes the JSON schema of a config as a user writes it, for an editor. In a config that
    extends another one, no key is required.
    """
    sections = section_schema(Config) | {"patternProperties": {"^x-": {}}}
    keys = typing.cast(dict[str, Json], sections["properties"])
    keys[EXTENDS_KEY] = EXTENDS
    forms: Json = {
        "if": {"required": [EXTENDS_KEY]},
        "then": without_required(sections),
        "else": sections,
    }
    heading: Json = {
        "$schema": DRAFT,
        "title": "eopd",
        "description": "A run of eopd. Short forms are taken as the program takes them; what must "
        "hold between several keys is only seen by `eopd check`.",
    }
    return json.dumps(heading | forms, indent=1, ensure_ascii=False) + "\n"


def without_required(schema: object) -> object:
    """Returns a schema in which mappings need no key; those in a list do, since it is replaced whole."""
    if isinstance(schema, list):
        return [without_required(part) for part in schema]

    if not isinstance(schema, dict):
        return schema

    kept = {key: part for key, part in schema.items() if key != "required"}
    return {key: part if key == "items" else without_required(part) for key, part in kept.items()}


def section_schema(section: Section) -> Json:
    """Describes a mapping of a section's keys, and no others."""
    texts = descriptions(section)
    fields = section.model_fields.items()
    required = [name for name, field in fields if field.is_required()]
    keys = {name: {"description": texts[name]} | field_schema(field) for name, field in fields}

    return {
        "type": "object",
        "properties": keys,
        "required": required,
        "additionalProperties": False,
    }


def field_schema(field: FieldInfo) -> Json:
    """Describes what may stand at a key, with its default. Nothing at all stands for null, for an
    empty list or mapping, and for a section of defaults.
    """
    value = value_schema(field.annotation, field.metadata, default_kind_of(field))
    default = None if field.is_required() else field.default
    is_section = isinstance(default, BaseModel)
    if may_be_null(field.annotation) or is_section or default in ([], (), {}):
        value = any_of(value, {"type": "null"})

    if field.is_required() or is_section:
        return value

    return value | {"default": str(default) if isinstance(default, Path) else default}


def value_schema(
    annotation: object, metadata: Sequence[object] = (), default_kind: str | None = None
) -> Json:
    """Describes what a type takes, in the order in which ``eopd.config.shape`` reads it."""
    if typing.get_origin(annotation) is typing.Annotated:
        inner, *bounds = typing.get_args(annotation)
        return value_schema(inner, [*metadata, *bounds], default_kind)

    if kinds := kinds_of(annotation):
        return any_of({"enum": list(kinds)}, *forms_schema(kinds, default_kind))

    if section := section_of(annotation):
        forms = [section_schema(section)]
        forms += [{"type": "boolean"}] if may_be_null(annotation) else []
        forms += [SCALARS[str]] if short_of(section) else []
        return any_of(*forms) if len(forms) > 1 else forms[0]

    if (item := item_of(annotation)) is not None:
        return list_schema(annotation, value_schema(item), metadata)

    if may_be_null(annotation):
        (present,) = (part for part in typing.get_args(annotation) if part is not NoneType)
        return value_schema(present, metadata)

    if typing.get_origin(annotation) is typing.Literal:
        return {"enum": list(typing.get_args(annotation))}

    if typing.get_origin(annotation) is dict:
        are_numbers = typing.get_args(annotation) == (int, int)
        return {"type": "object"} | (NUMBERS if are_numbers else {})

    return SCALARS[annotation] | limits(metadata, "Length")


def list_schema(annotation: object, item: Json, metadata: Sequence[object]) -> Json:
    """Describes a list, or its one item; a list of a fixed length has no short form."""
    parts = typing.get_args(annotation)
    listing: Json = {"type": "array", "items": item} | limits(metadata, "Items")
    if typing.get_origin(annotation) is tuple and parts[-1] is not Ellipsis:
        return listing | {"minItems": len(parts), "maxItems": len(parts)}

    return any_of(listing, item)


def forms_schema(kinds: dict[str, Section], default_kind: str | None) -> Iterator[Json]:
    """Describes the mappings of several forms; only the default one may do without ``kind``."""
    for kind, section in kinds.items():
        mapping = section_schema(section)
        keys = typing.cast(dict[str, Json], mapping["properties"])
        keys["kind"] = {"description": keys["kind"]["description"], "const": kind}
        yield mapping if kind == default_kind else mapping | {"required": ["kind"]}


def limits(metadata: Sequence[object], unit: str) -> Json:
    """Writes the bounds of a field in the words of JSON schema; ``unit`` is what its length counts."""
    words = KEYWORDS | {name: word.format(unit) for name, word in LENGTHS.items()}
    bounds = {word: bound_of(metadata, name) for name, word in words.items()}
    return {word: bound for word, bound in bounds.items() if bound is not None}


def any_of(*schemas: Json) -> Json:
    """Describes what one of several schemas takes; each may be several itself."""
    parts: list[object] = []
    for schema in schemas:
        nested = schema["anyOf"] if schema.keys() == {"anyOf"} else [schema]
        parts += typing.cast(list[object], nested)

    return {"anyOf": parts}


def render() -> dict[str, str]:
    """Returns texts by the name of their file, from the root of the repository."""
    return {PAGE: page_text(), SCHEMA: schema_text()}


if __name__ == "__main__":
    for file, text in render().items():
        (ROOT / file).write_text(text, encoding="utf-8")
