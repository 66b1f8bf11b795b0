"""YAML text to a tree and back. Keys that stand twice, endless trees and tags are refused here.

In: the text of a file, or the value of an override. Out: dicts, lists, ``str`` for what is quoted,
and ``Plain`` for what is not; what a ``Plain`` means is decided later, by its key. Beside the tree
comes the line of each value, by its place. Merge keys (``<<``) and anchors are resolved. Left out:
tags (``!!set``, ``!!python/...``), which no key needs.
"""

from collections.abc import Mapping
from pathlib import PurePath
from typing import Final

import yaml

from eopd.config.scalars import NULLS, Plain, native, unclear
from eopd.config.syntax import explain_syntax

_PLAIN: Final = "plain"
_TAG: Final = "tag:yaml.org,2002:"
_SCALARS: Final = {_TAG + kind for kind in ("int", "float", "bool", "null")}
_DEEPEST: Final = 64
_MOST: Final = 100_000
_SHOWN: Final = 80
_WIDE: Final = 1_000_000_000
_LINE_BREAKS: Final = "\n\x85\u2028\u2029"  # of YAML 1.1

Lines = Mapping[tuple[str, ...], int]


class DocumentError(Exception):
    """A text that is no tree, with the line and what is wrong there."""


class _Composer(yaml.SafeLoader):
    """PyYAML's composer, which decides nothing about unquoted scalars and goes ``_DEEPEST`` levels deep."""

    depth = 0

    def resolve(
        self, kind: type[yaml.Node], value: str | None, implicit: tuple[bool, bool] | bool | None
    ) -> str:
        if kind is yaml.ScalarNode:
            return _PLAIN if isinstance(implicit, tuple) and implicit[0] else f"{_TAG}str"

        return f"{_TAG}seq" if kind is yaml.SequenceNode else f"{_TAG}map"

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.depth += 1
        if self.depth > _DEEPEST:
            raise DocumentError(f"is nested more than {_DEEPEST} levels deep")

        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def read_document(text: str) -> tuple[object, Lines]:
    """Reads the tree of one YAML document, and the line of every key and item of a list by its place:
    that of ``a: [{b: 1}]`` has the places ``(a,)``, ``(a, 0)`` and ``(a, 0, b)``. The tree of an empty
    document is None.

    Raises:
        DocumentError: the text is not YAML, a key stands twice, or there is no end to the tree.
    """
    node, _ = _compose(text)
    if node is None:
        return None, {}

    reader = _Reader(text)
    return reader.tree(node, ()), reader.lines


def read_value(text: str) -> object:
    """Reads the tree of an override's value, which must be the whole text.

    Raises:
        DocumentError: as in ``read_document``, or a comment begins in it.
    """
    node, end = _compose(text)
    if text[end:].strip() or (node is None and text.strip()):
        raise DocumentError("ends at #, where a comment of YAML begins")

    return Plain("") if node is None else _Reader(text).tree(node, ())


def read_items(text: str) -> list[str]:
    """Returns the texts of values that stand side by side, as ``a,[b,c]`` has ``a`` and ``[b,c]``.

    Raises:
        DocumentError: as in ``read_value``, or a value is missing.
    """
    if not text.strip():
        return []

    inside = f"[{text}]"
    node, end = _compose(inside)
    if node is None or inside[end:].strip():
        raise DocumentError("ends at #, where a comment of YAML begins")

    if text.rstrip().endswith(","):
        raise DocumentError("ends with a comma: a value is missing")

    return [inside[item.start_mark.index : item.end_mark.index].strip() for item in node.value]


def _compose(text: str) -> tuple[yaml.Node | None, int]:
    """Returns the root, and how far into the text it reaches."""
    try:
        composer = _Composer(text)
        node = composer.get_single_node()
    except yaml.MarkedYAMLError as error:
        raise DocumentError(f"is not YAML: {explain_syntax(error, text)}") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the last two: \U of no character
        raise DocumentError(f"is not YAML: {str(error).partition(chr(10))[0]}") from None

    return node, 0 if node is None else node.end_mark.index


class _Reader:
    """Turns nodes into a tree; an alias is expanded wherever it stands, as long as that ends."""

    def __init__(self, text: str) -> None:
        self.lines: dict[tuple[str, ...], int] = {}
        self._text = text
        self._open: set[int] = set()
        self._count = 0

    def tree(self, node: yaml.Node, place: tuple[str, ...]) -> object:
        self._count += 1
        if self._count > _MOST:
            raise DocumentError(f"its aliases expand to more than {_MOST} values")

        if id(node) in self._open:
            raise DocumentError(f"line {_line(node)}: {_dotted(place)} contains itself")

        self.lines.setdefault(place, _line(node))
        self._open.add(id(node))
        tree = self._tree(node, place)
        self._open.remove(id(node))

        return tree

    def _tree(self, node: yaml.Node, place: tuple[str, ...]) -> object:
        match node:
            case yaml.MappingNode() if node.tag == f"{_TAG}map":
                return self._mapping(node, place)
            case yaml.SequenceNode() if node.tag == f"{_TAG}seq":
                items = enumerate(node.value)
                return [self.tree(item, (*place, str(index))) for index, item in items]
            case yaml.ScalarNode():
                return _scalar(node, self._comment(node))
            case _:
                raise DocumentError(f"line {_line(node)}: the tag {_tag(node)} means nothing here")

    def _comment(self, node: yaml.Node) -> str:
        """Returns the comment behind a scalar in its line, if there is one."""
        end = self._text.find("\n", node.end_mark.index)
        line = self._text[node.end_mark.index : end if end >= 0 else None]
        remainder = line.lstrip(" \t")
        return remainder.rstrip() if remainder.startswith("#") and remainder != line else ""

    def _mapping(self, node: yaml.MappingNode, place: tuple[str, ...]) -> dict[str, object]:
        entries: dict[str, object] = {}
        lines: dict[str, int] = {}
        merged: dict[str, object] = {}

        for key_node, value_node in node.value:
            key, line = _key(key_node), _line(key_node)
            key_place = (*place, str(key))
            if key in lines:
                at = (
                    f"both in line {line}"
                    if lines[key] == line
                    else f"lines {lines[key]} and {line}"
                )
                raise DocumentError(f"{_dotted(key_place)} stands twice ({at}): remove one")

            lines[key] = self.lines[key_place] = line
            value = self.tree(value_node, key_place)
            if key == "<<" and isinstance(key, Plain):
                merged = _merged(value, line)
                self.lines |= {(*place, str(name)): line for name in merged if name not in lines}
            else:
                entries[key] = value

        return merged | entries


def _scalar(node: yaml.ScalarNode, comment: str = "") -> str:
    text = str(node.value)
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise DocumentError(f"line {_line(node)}: a \\u escape there is half a character")

    if node.tag == _PLAIN or node.tag in _SCALARS:
        return Plain(text, comment)

    if node.tag != f"{_TAG}str":
        raise DocumentError(f"line {_line(node)}: the tag {_tag(node)} means nothing here")

    return text


def _key(node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise DocumentError(
            f"line {_line(node)}: a list or mapping cannot be a key; quote a text that "
            f"begins with {{ or ["
        )

    key = _scalar(node)
    if isinstance(key, Plain) and key == "":
        raise DocumentError(f"line {_line(node)}: there is no key before the colon")

    return key


def _merged(value: object, line: int) -> dict[str, object]:
    """The keys of ``<<``: of one mapping, or of several, of which the first that has a key wins."""
    parts = value if isinstance(value, list) else [value]
    merged: dict[str, object] = {}

    for part in reversed(parts):
        if not isinstance(part, dict):
            raise DocumentError(f"line {line}: << merges mappings; write <<: *name or <<: [*a, *b]")

        merged |= part

    return merged


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _dotted(place: tuple[str, ...]) -> str:
    return ".".join(place) or "the file"


def _tag(node: yaml.Node) -> str:
    return str(node.tag).replace(_TAG, "!!")


class _Dumper(yaml.SafeDumper):
    """Writes no aliases, and quotes what would not be read as text again."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    quoted = unclear(text) is not None or native(text) != text
    style = '"' if any(mark in text for mark in _LINE_BREAKS) else "'" if quoted else None
    return dumper.represent_scalar(f"{_TAG}str", text, style=style)


def _represent_plain(dumper: yaml.SafeDumper, text: Plain) -> yaml.Node:
    if text in NULLS:
        return dumper.represent_none(None)

    tag = dumper.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
    return yaml.ScalarNode(tag, str(text))


def _represent_path(dumper: yaml.SafeDumper, path: PurePath) -> yaml.Node:
    return _represent_text(dumper, str(path))


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(Plain, _represent_plain)
_Dumper.add_multi_representer(PurePath, _represent_path)


def write_tree(tree: object) -> str:
    """Writes YAML that ``read_document`` reads as the same tree, with each value in a line of its own."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, width=_WIDE, allow_unicode=True)


def show(value: object) -> str:
    """Writes a value in one line of YAML, for a message; a long one is cut."""
    if isinstance(value, Plain) and value not in NULLS:
        text = str(value)
    else:
        text = yaml.dump(
            value,
            Dumper=_Dumper,
            default_flow_style=True,
            sort_keys=False,
            width=_WIDE,
            allow_unicode=True,
        )
        text = text.removesuffix("\n").removesuffix("\n...")

    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..."
