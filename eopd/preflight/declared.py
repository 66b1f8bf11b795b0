"""Types of options are read from the source of an installed library, without importing it: an import
of vLLM takes ten seconds.

In: Python files. Out: pydantic models with the names, types and bounds of their classes. A type
that is not made of plain ones (numbers, texts, literals, lists, mappings) becomes ``object``, which
accepts anything.

Example: of this file ``Declarations.read([file]).model("Args")`` is a model that accepts
``{"seed": 0}`` and ``{"mode": null}``, and refuses ``{"seed": -1}`` and ``{"sed": 0}``.

    class Args:
        seed: int = Field(default=0, ge=0)
        mode: Literal["fast", "exact"] | None = None
"""

import ast
import importlib.util
import types
import typing
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, Field, create_model

_PLAIN: Final = {"int": int, "float": float, "bool": bool, "str": str, "Path": str, "None": None}
_COLLECTIONS: Final[Mapping[str, type]] = {
    "list": list,
    "List": list,
    "set": list,
    "dict": dict,
    "Dict": dict,
}
_BOUNDS: Final = frozenset({"gt", "ge", "lt", "le"})


@dataclass(frozen=True, slots=True)
class Declarations:
    """Declarations are the classes and type aliases of some files, by name."""

    classes: dict[str, ast.ClassDef] = field(default_factory=dict)
    aliases: dict[str, ast.expr] = field(default_factory=dict)

    @classmethod
    def read(cls, files: Iterable[Path]) -> typing.Self:
        """Parses the files; of two classes of one name the first counts."""
        declared = cls()
        for file in sorted(files):
            for node in ast.parse(file.read_text(encoding="utf-8")).body:
                match node:
                    case ast.ClassDef():
                        declared.classes.setdefault(node.name, node)
                    case (
                        ast.Assign(targets=[ast.Name(id=name)], value=ast.expr() as value)
                        | ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value)
                    ):
                        declared.aliases.setdefault(name, value)

        return declared

    def model(
        self,
        *names: str,
        nested: str | None = None,
        only: Container[str] | None = None,
        instead: Mapping[str, object] | None = None,
    ) -> type[BaseModel]:
        """Returns classes as one model, in which nothing is required and nothing else allowed.

        Args:
            names: the names of the classes.
            nested: the base of the classes that become models within it; others accept anything.
            only: the fields whose types are needed; others accept anything.
            instead: types of fields that are narrower than the declared ones.
        """
        fields: dict[str, object] = {}
        for node in (node for name in names for node in self._fields(name)):
            spellings = [node.target.id, *_alias(node.value)]
            kind: object = object
            if only is None or any(name in only for name in spellings):
                bounds = self._bounds(node.value) or self._bounds_by_name(node)
                kind = self._type(node.annotation, nested)
                kind = typing.Annotated[kind, Field(**bounds)] if bounds else kind

            fields |= {name: kind for name in spellings if not name.startswith("_")}

        narrower = {name: kind for name, kind in (instead or {}).items() if name in fields}

        return options_model(names[0], fields | narrower)

    def alias(self, name: str) -> object:
        """Returns the type that a name stands for, or None; ``object`` where there is no such name."""
        if name not in self.aliases:
            return object

        return _union([self._type(self.aliases[name], None), None])

    def _fields(self, name: str) -> list["_AnnotatedName"]:
        body = self.classes[name].body if name in self.classes else []
        return [
            typing.cast(_AnnotatedName, node)
            for node in body
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        ]

    def _type(self, node: ast.expr, nested: str | None) -> object:
        match node:
            case ast.Constant(value=None):
                return None
            case ast.Constant(value=str(text)):
                return self._type(ast.parse(text, mode="eval").body, nested)
            case ast.Name(id=name):
                return self._named(name, nested)
            case ast.BinOp(left=left, op=ast.BitOr(), right=right):
                return _union([self._type(left, nested), self._type(right, nested)])
            case ast.Subscript(value=ast.Name(id=outer), slice=inner):
                return self._subscript(outer, inner, nested)
            case _:
                return object

    def _named(self, name: str, nested: str | None) -> object:
        builtin = {**_PLAIN, **_COLLECTIONS}
        if name in builtin:
            return builtin[name]

        if name in self.aliases:
            return self._type(self.aliases[name], nested)

        if name not in self.classes:
            return object

        bases = [base.id for base in self.classes[name].bases if isinstance(base, ast.Name)]
        if "Enum" in bases:
            return _literal(self._members(name))

        return self.model(name, nested=nested) if nested in bases else object

    def _subscript(self, outer: str, inner: ast.expr, nested: str | None) -> object:
        parts = inner.elts if isinstance(inner, ast.Tuple) else [inner]
        if outer == "Literal":
            return _literal([word for part in parts for word in self._words(part)])

        inside = [self._type(part, nested) for part in parts]
        if outer in ("Optional", "Union"):
            return _union([*inside, None] if outer == "Optional" else inside)

        if outer in _COLLECTIONS:
            return types.GenericAlias(_COLLECTIONS[outer], tuple(inside))

        return object

    def _words(self, node: ast.expr) -> list[object]:
        """Returns the values of a literal; another literal may be one of them by its name."""
        match node:
            case ast.Constant(value=value):
                return [value]
            case ast.Name(id=name) if name in self.aliases:
                alias = self.aliases[name]
                inside = alias.slice if isinstance(alias, ast.Subscript) else alias
                parts = inside.elts if isinstance(inside, ast.Tuple) else [inside]
                return [word for part in parts for word in self._words(part)]
            case _:
                return [object]

    def _members(self, name: str) -> list[object]:
        body = self.classes[name].body
        values = [node.value for node in body if isinstance(node, ast.Assign)]
        return [value.value for value in values if isinstance(value, ast.Constant)]

    def _bounds(self, default: ast.expr | None) -> dict[str, typing.Any]:
        """Returns the bounds in ``Field(default=1, ge=0)``, or of the other class's field that
        ``default`` names.
        """
        match default:
            case ast.Call(func=ast.Name(id="Field"), keywords=keywords):
                return {
                    name: value for name, value in _constants(keywords).items() if name in _BOUNDS
                }
            case (
                ast.Attribute(value=ast.Name(id=owner), attr=name)
                | ast.Call(
                    func=ast.Name(id="get_field"),
                    args=[ast.Name(id=owner), ast.Constant(value=str(name))],
                )
            ):
                fields = [node for node in self._fields(owner) if node.target.id == name]
                return self._bounds(fields[0].value) if fields else {}
            case _:
                return {}

    def _bounds_by_name(self, node: "_AnnotatedName") -> dict[str, typing.Any]:
        """Returns the bounds of an option that is null until it is set, if all fields of its name
        have the same.
        """
        if not (isinstance(node.value, ast.Constant) and node.value.value is None):
            return {}

        fields = [field for name in self.classes for field in self._fields(name)]
        namesakes = [field for field in fields if field.target.id == node.target.id]
        bounds = list(filter(None, (self._bounds(field.value) for field in namesakes)))
        return bounds[0] if bounds and all(other == bounds[0] for other in bounds) else {}


class _AnnotatedName(ast.AnnAssign):
    """A statement ``name: annotation = value``."""

    target: ast.Name


def source_of(library: str) -> Path | None:
    """Returns the directory of a library's source, found without importing it; None where it is not
    installed.
    """
    spec = importlib.util.find_spec(library)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def options_model(name: str, fields: Mapping[str, object]) -> type[BaseModel]:
    """Returns a model of options by name and type, none of which is required."""
    config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())
    optional = {option: (kind, None) for option, kind in fields.items()}
    model = create_model(name, __config__=config, **optional)  # type: ignore[call-overload]
    return typing.cast(type[BaseModel], model)


def _alias(default: ast.expr | None) -> list[str]:
    keywords = default.keywords if isinstance(default, ast.Call) else []
    return [str(value) for name, value in _constants(keywords).items() if name == "alias"]


def _constants(keywords: Iterable[ast.keyword]) -> dict[str, typing.Any]:
    """Returns the arguments that are numbers and texts, by name."""
    return {
        str(keyword.arg): keyword.value.value
        for keyword in keywords
        if isinstance(keyword.value, ast.Constant)
    }


def _union(parts: list[object]) -> object:
    if object in parts:
        return object

    return typing.Union[tuple(parts)]  # noqa: UP007 - the parts are known only at run time


def _literal(values: list[object]) -> object:
    if not values or object in values:
        return object

    return typing.Literal[tuple(values)]
