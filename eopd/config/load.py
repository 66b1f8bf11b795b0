"""YAML and ``--set a.b=c`` to a checked ``Config``; every mistake is one ``ConfigError`` that
names the key.
"""

import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from pydantic import BaseModel, ValidationError

from eopd.config.chain import read_chain
from eopd.config.choices import with_choices
from eopd.config.document import write_tree
from eopd.config.errors import ConfigError
from eopd.config.messages import explain
from eopd.config.root import Config
from eopd.config.shape import Place, shape
from eopd.config.written import SET, Origins, Written

SectionT = typing.TypeVar("SectionT", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A config, and the origin of every value that was written, by its place; others are defaults."""

    config: Config
    origins: Origins


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file, over those that it extends, and apply ``a.b=c`` overrides, whose values
    are YAML.

    Raises:
        ConfigError: a file is missing, is no YAML mapping, or a key or value is wrong.

    Every ``dtype: auto`` is chosen for this machine, and ``learner.zero_stage: auto`` for the run.
    """
    return load_with_origins(path, overrides).config


def load_with_origins(path: Path, overrides: Sequence[str] = ()) -> Loaded:
    """Loads a config as ``load_config`` does, and says where each value was written."""
    return _loaded(str(path), Written.in_files(read_chain(path)), overrides)


def change_config(config: Config, overrides: Sequence[str]) -> Config:
    """Returns a config with ``a.b=c`` overrides of the command line.

    Raises:
        ConfigError: as in ``load_config``.
    """
    return _loaded("--set", Written.of(config.model_dump(), {}), overrides).config


def read_leaves(path: Path, overrides: Sequence[str] = ()) -> dict[str, object]:
    """Returns the values of a config file, over those that it extends, with ``a.b=c`` overrides, by
    dotted name and as they were written: a relative path stays one. Values are not checked.

    Raises:
        ConfigError: as in ``load_config``, but for keys and values that are wrong.
    """
    written = _overridden(Written.in_files(read_chain(path)), overrides)
    return flatten(written.tree)


def _overridden(written: Written, overrides: Sequence[str]) -> Written:
    for override in overrides:
        written = written.overridden(override)

    return written


def _loaded(name: str, written: Written, overrides: Sequence[str]) -> Loaded:
    written = _overridden(written, overrides)
    values, faults = shape(written.tree, Config)
    mistakes = {place: f"{'.'.join(place)}: {fault}" for place, fault in faults.items()}

    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            place, line = explain(detail, Config)
            mistakes.setdefault(place, line)

        raise ConfigError(_message(name, mistakes, written.origins)) from None

    if mistakes:
        raise ConfigError(_message(name, mistakes, written.origins))

    return Loaded(with_choices(config), written.origins)


def _message(name: str, mistakes: Mapping[Place, str], origins: Origins) -> str:
    """Writes a line for each mistake; one of a value from elsewhere, another file of the chain or the
    command line, says so.
    """
    lines: list[str] = []
    for place, line in mistakes.items():
        origin = origins.get(place)
        if origin == SET:
            line += " (on the command line)"
        elif origin is not None and origin.rpartition(":")[0] != name:
            line += f" (in {origin})"

        lines.append(line)

    return f"{name}: " + "\n".join(lines)


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


def flatten(tree: object, prefix: str = "", *, lists: bool = True) -> dict[str, object]:
    """Returns the leaves of a tree by dotted name. Items of lists are named by number; without
    ``lists`` a list is a leaf.
    """
    if isinstance(tree, Mapping):
        items = [(f"{prefix}.{key}" if prefix else str(key), value) for key, value in tree.items()]
    elif lists and isinstance(tree, list):
        items = [(f"{prefix}.{index}", value) for index, value in enumerate(tree)]
    else:
        return {prefix: tree}

    return {
        key: leaf
        for name, value in items
        for key, leaf in flatten(value, name, lists=lists).items()
    }
