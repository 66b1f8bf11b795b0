"""Types that the source of an installed library declares, read without importing it: vLLM takes ten
seconds.

In: Python files. Out: pydantic models with the names, types and bounds of their classes. A type
that is not made of plain ones (numbers, texts, literals, lists, mappings) becomes ``object``:
anything.
"""

import ast
import types
import typing
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, Field, create_model

_PLAIN: Final[Mapping[str, object]] = {
    "int": int,
    "float": float,
    "bool": bool,
    "str": str,
    "Path": str,
    "None": None,
}
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
    """What the classes and type aliases of some files say, by name."""

    classes: dict[str, ast.ClassDef] = field(default_factory=dict)
    aliases: dict[str, ast.expr] = field(default_factory=dict)

    @classmethod
    def read(cls, files: Iterable[Path]) -> typing.Self:
        """Parse the files; of two classes of one name the first counts."""
        found = cls()
        for file in sorted(files):
            for node in ast.parse(file.read_text(encoding="utf-8")).body:
                match node:
                    case ast.ClassDef():
                        found.classes.setdefault(node.name, node)
                    case (
                        ast.Assign(targets=[ast.Name(id=name)], value=ast.expr() as value)
                        | ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value)
                    ):
                        found.aliases.setdefault(name, value)

        return found

    def model(
        self,
        *names: str,
        nested: str | None = None,
        only: Container[str] | None = None,
        instead: Mapping[str, object] | None = None,
    ) -> type[BaseModel]:
        """Classes as one model in which nothing is required and nothing else allowed.

        Args:
            names: of the classes.
            nested: base of the classes that become models within it; others take anything.
            only: the fields whose types are wanted; others take anything.
            instead: types of fields that are narrower than the declared ones.
        """
        fields: dict[str, object] = {}
        for node in (node for name in names for node in self._fields(name)):
            known = [node.target.id, *_alias(node.value)]
            wanted: object = object
            if only is None or any(name in only for name in known):
                bounds = self._bounds(node.value) or self._bounds_by_name(node)
                wanted = self._type(node.annotation, nested)
                wanted = typing.Annotated[wanted, Field(**bounds)] if bounds else wanted

            fields |= {name: wanted for name in known if not name.startswith("_")}

        narrower = {name: wanted for name, wanted in (instead or {}).items() if name in fields}

        return options_model(names[0], fields | narrower)

    def alias(self, name: str) -> object:
        """What a name of a type stands for, or null; anything, where there is no such name."""
        return (
            _union([self._type(self.aliases[name], None), None]) if name in self.aliases else object
        )

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
        if name in _PLAIN:
            return _PLAIN[name]

        if name in _COLLECTIONS:
            return _COLLECTIONS[name]

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
        if outer == "Optional":
            return _union([*inside, None])

        if outer == "Union":
            return _union(inside)

        if outer in _COLLECTIONS:
            return types.GenericAlias(_COLLECTIONS[outer], tuple(inside))

        return object

    def _words(self, node: ast.expr) -> list[object]:
        """The values of a literal; another literal may be one of them by its name."""
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
        found = [node.value for node in body if isinstance(node, ast.Assign)]
        return [value.value for value in found if isinstance(value, ast.Constant)]

    def _bounds(self, default: ast.expr | None) -> dict[str, typing.Any]:
        """Bounds in ``Field(default=1, ge=0)``, or of the other class's field that
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
                found = [node for node in self._fields(owner) if node.target.id == name]
                return self._bounds(found[0].value) if found else {}
            case _:
                return {}

    def _bounds_by_name(self, node: "_AnnotatedName") -> dict[str, typing.Any]:
        """Bounds of an option that is null until it is set, if all fields of its name have
        the same.
        """
        if not (isinstance(node.value, ast.Constant) and node.value.value is None):
            return {}

        fields = [field for name in self.classes for field in self._fields(name)]
        found = [self._bounds(field.value) for field in fields if field.target.id == node.target.id]
        bounds = [one for one in found if one]
        return bounds[0] if bounds and all(one == bounds[0] for one in bounds) else {}


class _AnnotatedName(ast.AnnAssign):
    """``name: annotation = value``."""

    target: ast.Name


def options_model(name: str, fields: Mapping[str, object]) -> type[BaseModel]:
    """A model of options by name and type, none of which is required."""
    config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())
    optional = {known: (wanted, None) for known, wanted in fields.items()}
    made = create_model(name, __config__=config, **optional)  # type: ignore[call-overload]
    return typing.cast(type[BaseModel], made)


def _alias(default: ast.expr | None) -> list[str]:
    keywords = default.keywords if isinstance(default, ast.Call) else []
    return [str(value) for name, value in _constants(keywords).items() if name == "alias"]


def _constants(keywords: Iterable[ast.keyword]) -> dict[str, typing.Any]:
    """Arguments by name, of those that are given as numbers and texts."""
    return {
        str(one.arg): one.value.value for one in keywords if isinstance(one.value, ast.Constant)
    }


def _union(parts: list[object]) -> object:
    if object in parts:
        return object

    return typing.Union[tuple(parts)]  # noqa: UP007 - of parts that are only known here


def _literal(values: list[object]) -> object:
    if not values or object in values:
        return object

    return typing.Literal[tuple(values)]
