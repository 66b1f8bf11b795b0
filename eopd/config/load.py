"""YAML and ``--set a.b=c`` to a checked ``Config``; every mistake is one ``ConfigError`` that names the key."""

import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from eopd.config.processor import with_dtypes
from eopd.config.sections import Config


class ConfigError(Exception):
    """A user's mistake: shown as one message, exit code 2, no traceback."""


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file and apply ``a.b=c`` overrides, whose values are YAML.

    Raises:
        ConfigError: the file is missing, is no YAML mapping, or a key or value is wrong.

    Every ``dtype: auto`` is chosen for this machine.
    """
    tree = _read_yaml(path)
    for override in overrides:
        _apply(tree, override)
    try:
        return with_dtypes(Config.model_validate(tree))
    except ValidationError as error:
        lines = [_explain(detail) for detail in error.errors()]
        raise ConfigError(f"{path}: " + "\n".join(lines)) from None


def dump_config(config: Config) -> str:
    """The resolved config as YAML: loading it again gives an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _read_yaml(path: Path) -> dict[str, object]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must be a mapping of sections, is {type(tree).__name__}")
    return tree


def _apply(tree: dict[str, object], override: str) -> None:
    """Set one key in place; list items are named by index (``teachers.0.model=...``)."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"--set {override}: must be section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {override}: the value is not YAML") from None
    *parents, last = dotted.split(".")
    node: object = tree
    for part in parents:
        if isinstance(node, dict):
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        else:
            node = _item(node, part, override)
    if isinstance(node, dict):
        node[last] = value
    elif isinstance(node, list):
        _item(node, last, override)
        node[int(last)] = value
    else:
        raise ConfigError(f"--set {override}: {'.'.join(parents)} is a value, it has no key {last}")


def _item(node: object, index: str, override: str) -> object:
    if not isinstance(node, list):
        raise ConfigError(f"--set {override}: {index} lies below a value that has no keys")
    if not index.isdigit() or int(index) >= len(node):
        raise ConfigError(f"--set {override}: {index} must be an index below {len(node)}")
    return typing.cast(object, node[int(index)])


def _explain(detail: ErrorDetails) -> str:
    """One line: key, value, what is allowed."""
    location = [str(part) for part in detail["loc"]]
    key = ".".join(location) or "config"
    if detail["type"] == "extra_forbidden":
        allowed = sorted(_fields_at(Config, location[:-1]))
        close = difflib.get_close_matches(location[-1], allowed, n=1)
        hint = f"did you mean {close[0]}?" if close else f"allowed here: {', '.join(allowed)}"
        return f"{key}: unknown key; {hint}"
    if detail["type"] == "missing":
        return f"{key}: is required"
    message = detail["msg"].removeprefix("Value error, ")
    if isinstance(detail["input"], Mapping):
        return f"{key}: {message}"
    return f"{key}: {message} (is {detail['input']!r})"


def _fields_at(model: type[BaseModel], location: Sequence[str]) -> set[str]:
    """Keys allowed at ``location``: follows sections, list indices and the tags of unions."""
    candidates: list[type[BaseModel]] = [model]
    for part in location:
        fields = [candidate.model_fields[part] for candidate in candidates if part in candidate.model_fields]
        if fields:
            candidates = [section for field in fields for section in _sections(field.annotation)]
        else:  # a list index, or the tag pydantic adds for a member of a union
            tagged = [c for c in candidates if "kind" in c.model_fields and _tag(c) == part]
            candidates = tagged or candidates
    return {name for candidate in candidates for name in candidate.model_fields}


def _tag(model: type[BaseModel]) -> object:
    return typing.get_args(model.model_fields["kind"].annotation)[0]


def _sections(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [section for argument in typing.get_args(annotation) for section in _sections(argument)]


def flatten(tree: object, prefix: str = "") -> dict[str, object]:
    """Leaves of a tree by dotted name; items of lists by their number."""
    if isinstance(tree, Mapping):
        items = [(f"{prefix}.{key}" if prefix else str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list):
        items = [(f"{prefix}.{index}", value) for index, value in enumerate(tree)]
    else:
        return {prefix: tree}
    return {key: leaf for name, value in items for key, leaf in flatten(value, name).items()}
