"""YAML and ``--set a.b=c`` to a checked ``Config``; every mistake is one ``ConfigError`` that
names the key.
"""

import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from pydantic import BaseModel, ValidationError

from eopd.config.choices import with_choices
from eopd.config.document import DocumentError, read_tree, read_value, show, write_tree
from eopd.config.messages import explain
from eopd.config.root import Config
from eopd.config.shape import shape
from eopd.config.teacher import TeacherConfig

SectionT = typing.TypeVar("SectionT", bound=BaseModel)

DEFAULT_NAME = TeacherConfig.model_fields["name"].default
_HOLDER = "x-"  # begins the name of a top-level key that only holds anchors


class ConfigError(Exception):
    """A user's mistake: shown as one message, exit code 2, no traceback."""


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file and apply ``a.b=c`` overrides, whose values are YAML.

    Raises:
        ConfigError: the file is missing, is no YAML mapping, or a key or value is wrong.

    Every ``dtype: auto`` is chosen for this machine, and ``learner.zero_stage: auto`` for the run.
    """
    return _config_of(str(path), _read(path), overrides)


def change_config(name: str, config: Config, overrides: Sequence[str]) -> Config:
    """Returns a config with ``a.b=c`` overrides; ``name`` begins the message where one is wrong.

    Raises:
        ConfigError: as in ``load_config``.
    """
    tree = typing.cast(dict[str, object], read_tree(dump_config(config)))
    return _config_of(name, tree, overrides)


def read_leaves(path: Path, overrides: Sequence[str] = ()) -> dict[str, object]:
    """Returns the values of a config file with ``a.b=c`` overrides by dotted name, as they were
    written: a relative path stays one. Values are not checked.

    Raises:
        ConfigError: as in ``load_config``, but for keys and values that are wrong.
    """
    return flatten(_overridden(_read(path), overrides))


def _overridden(tree: dict[str, object], overrides: Sequence[str]) -> dict[str, object]:
    tree = _expanded(tree)
    for override in overrides:
        _apply(tree, override)
        tree = _expanded(tree)  # the next one may name what a short form stands for

    return tree


def _config_of(name: str, tree: dict[str, object], overrides: Sequence[str]) -> Config:
    values, faults = shape(_overridden(tree, overrides), Config)
    mistakes = {place: f"{'.'.join(place)}: {fault}" for place, fault in faults.items()}

    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            place, line = explain(detail, Config)
            mistakes.setdefault(place, line)

        raise ConfigError(f"{name}: " + "\n".join(mistakes.values())) from None

    if mistakes:
        raise ConfigError(f"{name}: " + "\n".join(mistakes.values()))

    return with_choices(config)


def make_section(
    section: type[SectionT],
    option_names: Mapping[str, str] = MappingProxyType({}),
    **options: object,
) -> SectionT:
    """Makes a section from options of the command line, each under the name of its key.

    Args:
        section: the type of the section.
        option_names: what the user calls a key where that is not ``--key``.
        options: the values by key.

    Raises:
        ConfigError: a value is wrong.
    """
    try:
        return section.model_validate(options)
    except ValidationError as error:
        lines: list[str] = []
        for detail in error.errors(include_url=False):
            key, colon, fault = explain(detail, section)[1].partition(":")
            lines.append(option_names.get(key, f"--{key.replace('_', '-')}") + colon + fault)

        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def dump_config(config: Config) -> str:
    """Writes the resolved config as YAML; loading it again gives an equal config."""
    return write_tree(config.model_dump())


def _read(path: Path) -> dict[str, object]:
    try:
        tree = read_tree(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        fault = f"byte {error.start + 1} is no UTF-8; save it as UTF-8 text"
        raise ConfigError(f"{path}: is not YAML: {fault}") from None
    except DocumentError as error:
        raise ConfigError(f"{path}: {error}") from None

    if not isinstance(tree, dict):
        contents = "is empty" if tree is None else f"is {show(tree)}"
        raise ConfigError(f"{path}: must be a mapping of sections ({contents})")

    return {key: value for key, value in tree.items() if not key.startswith(_HOLDER)}


def _expanded(tree: dict[str, object]) -> dict[str, object]:
    """The tree with short forms written out, so that an override can name what they stand for."""
    expanded, _ = shape(tree, Config)
    return typing.cast(dict[str, object], expanded)


def _apply(tree: dict[str, object], override: str) -> None:
    """Set one key in place; list items are named by index (``teachers.0.model=...``)."""
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

    try:
        value = read_value(text)
    except DocumentError as error:
        fault = str(error).replace("line 1: ", "")
        quoted = f"put YAML's quotes around a text: --set '{dotted}=\"...\"'"
        raise ConfigError(f"--set {override}: {fault}; {quoted}") from None

    node: object = tree
    for depth, part in enumerate(parents):
        node = _below(node, part, parents[:depth], override)

    if isinstance(node, dict):
        node[last] = value
        node.pop(f"{last}_reason", None)  # of another value, which was chosen
    elif isinstance(node, list):
        node[_index(node, last, parents, override)] = value
    else:
        raise ConfigError(f"--set {override}: {'.'.join(parents)} is a value, it has no key {last}")


def _below(node: object, part: str, parents: Sequence[str], override: str) -> object:
    if isinstance(node, list):
        return typing.cast(object, node[_index(node, part, parents, override)])

    if not isinstance(node, dict):
        raise ConfigError(f"--set {override}: {'.'.join(parents)} is a value, it has no key {part}")

    if node.get(part) in (None, ""):
        node[part] = {}

    return typing.cast(object, node[part])


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


def flatten(tree: object, prefix: str = "") -> dict[str, object]:
    """Returns the leaves of a tree by dotted name; items of lists are named by number."""
    if isinstance(tree, Mapping):
        items = [(f"{prefix}.{key}" if prefix else str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list):
        items = [(f"{prefix}.{index}", value) for index, value in enumerate(tree)]
    else:
        return {prefix: tree}

    return {key: leaf for name, value in items for key, leaf in flatten(value, name).items()}
