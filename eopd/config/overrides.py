"""An override ``--set a.b=c`` is applied to a tree in long form; its value is YAML."""

from collections.abc import Sequence
from typing import Any, Final

from eopd.config.chain import EXTENDS
from eopd.config.document import DocumentError, read_value
from eopd.config.errors import ConfigError
from eopd.config.shape import Place
from eopd.config.teacher import TeacherConfig

DEFAULT_NAME: Final = TeacherConfig.model_fields["name"].default


def apply_override(tree: dict[str, object], override: str) -> Place:
    """Sets one key of a tree; items of lists are named by index (``teachers.0.model=...``) or name.

    Returns:
        The place of the key.

    Raises:
        ConfigError: the override has no key and value, or a part of its key leads nowhere.
    """
    dotted, equals, text = override.partition("=")
    *parents, last = dotted.split(".")
    if not equals:
        raise ConfigError(f"--set {override}: must be section.key=value")

    if "[" in dotted:
        numbered = dotted.replace("[", ".").replace("]", "")
        raise ConfigError(
            f"--set {override}: an item of a list is named by its number: {numbered}=..."
        )

    if not all((*parents, last)):
        raise ConfigError(
            f"--set {override}: must be section.key=value; a part of the key is empty"
        )

    if dotted == EXTENDS:
        raise ConfigError(f"--set {override}: a config extends another one in its file alone")

    quoted = f"put YAML's quotes around a text: --set '{dotted}=\"...\"'"
    if text.lstrip().startswith(("|", ">")) and "\n" not in text:
        mark = text.lstrip()[0]
        raise ConfigError(
            f"--set {override}: {mark} begins a text in the lines below, and there are none; {quoted}"
        )

    try:
        value = read_value(text)
    except DocumentError as error:
        fault = str(error).replace("line 1: ", "")
        raise ConfigError(f"--set {override}: {fault}; {quoted}") from None

    node: Any = tree
    place: Place = ()
    for depth, part in enumerate(parents):
        key = _key(node, part, parents[:depth], override)
        if isinstance(node, dict) and node.get(part) in (None, ""):
            node[part] = {}

        node = node[key]
        place = (*place, str(key))

    key = _key(node, last, parents, override)
    node[key] = value
    if isinstance(node, dict):
        node.pop(f"{last}_reason", None)  # of another value, which was chosen

    return (*place, str(key))


def _key(node: object, part: str, parents: Sequence[str], override: str) -> str | int:
    """Returns the key of a mapping, or the index of a list, that a part of an override names."""
    if isinstance(node, dict):
        return part

    if isinstance(node, list):
        return _index(node, part, parents, override)

    raise ConfigError(f"--set {override}: {'.'.join(parents)} is a value, it has no key {part}")


def _index(node: Sequence[object], part: str, parents: Sequence[str], override: str) -> int:
    if (
        part.isascii()
        and part.isdigit()
        and len(part) <= len(str(len(node)))
        and int(part) < len(node)
    ):
        return int(part)

    key = ".".join(parents)
    if not node:
        raise ConfigError(f"--set {override}: {key} is an empty list; set all of it: {key}=[...]")

    names = [
        str(item.get("name", DEFAULT_NAME)) if isinstance(item, dict) else None for item in node
    ]
    if names.count(part) == 1:
        return names.index(part)

    if not part.lstrip("-").isdigit():
        raise ConfigError(
            f"--set {override}: {key} is a list; write {key}.0.{part} for its first item"
        )

    raise ConfigError(f"--set {override}: {key}.{part} must be an index below {len(node)}")
