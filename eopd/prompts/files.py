"""Rows are read from JSONL files, Parquet files, data sets by name, and functions of the user.

A row has its columns, and the place where it stands, which a message on it begins with.
"""

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Final, cast

from eopd.config import ConfigError, Part
from eopd.config.base import DATA_SUFFIXES
from eopd.config.json_text import JsonError, parse_json
from eopd.config.pointer import require_no_pointer
from eopd.plugins import rows_of
from eopd.prompts.arrow import as_written, read_parquet
from eopd.prompts.named import load_named, names_a_data_set, parse_data_name

COLUMNS_SHOWN: Final = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class DataRow:
    """A data row is one row of a data set.

    ``number`` is its line in a JSONL file, and elsewhere its number, counted from 1. ``where``
    names the key of the config, the data set, and the row. ``names`` has the columns, or fields
    in them, that play a role under another name than their own: ``{"prompt": "question"}``.
    """

    where: str
    number: int
    columns: Mapping[str, object]
    names: Mapping[str, str] = field(default_factory=dict)

    def name(self, role: str) -> str:
        """Returns the name of the column or field that plays a role, such as ``prompt``."""
        return self.names.get(role, role)

    def get(self, role: str) -> object:
        """Returns the value that plays a role; None where there is none."""
        return value_of(self.columns, self.name(role))


def value_of(columns: Mapping[str, object], name: str) -> object:
    """Returns the value of a column, or of a field in it; None where there is none.

    Example: ``a.b`` is the column ``a.b`` where there is one, else the field ``b`` of the object in
    the column ``a``.
    """
    if name in columns:
        return columns[name]

    outer, _, inner = name.partition(".")
    within = columns.get(outer)

    return value_of(within, inner) if inner and isinstance(within, Mapping) else None


def read_data(
    spec: str, key: str = "prompts.data", names: Mapping[str, str] = MappingProxyType({})
) -> list[DataRow]:
    """Reads all rows of a ``.jsonl`` or ``.parquet`` file, or of a data set by name.

    A name is ``NAME``, ``NAME:SPLIT`` or ``NAME:SUBSET:SPLIT``, e.g. ``openai/gsm8k:main:train``;
    the split is ``train`` where none is named, and a revision stands behind the name.

    Args:
        spec: The file or the name.
        key: The key of the config that names it, for messages.
        names: The columns, or fields in them, that play a role under another name.

    Raises:
        ConfigError: it is missing, unreadable, empty, of another kind, or has no such column.
    """
    try:
        rows = _read(spec, key)
    except OSError as error:
        hint = ""
        if "/_ray_pkg_" in spec:
            hint = "; it was uploaded with a job that is gone: name a copy with --set"
        elif "*" in spec:
            hint = "; there are no patterns: name each file in a list, or a folder as FOLDER:train"

        raise ConfigError(
            f"{key}: {spec} cannot be read ({error.strerror or error}){hint}"
        ) from None

    return _with_names(rows, names, f"{key}: {spec}")


def read_part(part: Part, key: str, columns: Mapping[str, str]) -> list[DataRow]:
    """Reads all rows of a part of the prompts, wherever they come from.

    Args:
        part: The part.
        key: The key of the config that names it, for messages.
        columns: The columns that play a role under another name, where the part names none itself.

    Raises:
        ConfigError: as ``read_data``; a function cannot be loaded, raises, or yields no rows.
    """
    names = columns if part.columns is None else part.columns
    if part.source is not None:
        names = {role: name for role, name in names.items() if role != "source"}

    if part.function is None:
        return read_data(part.name, key, names)

    where = f"{key}: {part.function}"
    rows = _numbered(rows_of(key, part.function, part.options), where)

    return _with_names(rows, names, where)


def _with_names(rows: Sequence[DataRow], names: Mapping[str, str], where: str) -> list[DataRow]:
    """Returns the rows of a data set, whose columns play the roles of ``names``.

    Raises:
        ConfigError: there are no rows, or none of them has one of these columns.
    """
    if not rows:
        raise ConfigError(f"{where} has no rows")

    known = dict.fromkeys(chain.from_iterable(row.columns for row in rows))
    faults = []
    for role, name in names.items():
        if name in known or any(value_of(row.columns, name) is not None for row in rows):
            continue

        named = dict.fromkeys(chain.from_iterable(_names(row.columns) for row in rows))
        close = difflib.get_close_matches(name, named, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        faults.append(
            f"{where}: has no column {name!r} to be {role}; {hint}its columns are "
            f"{_listed(named if '.' in name else known)}"
        )

    if faults:
        raise ConfigError("\n".join(faults))

    return [_named(row, names) for row in rows]


def _names(columns: Mapping[str, object], within: str = "") -> Iterator[str]:
    """Yields the names of columns, each followed by those of the fields in it."""
    for name, value in columns.items():
        yield within + name
        if isinstance(value, Mapping):
            yield from _names(value, f"{within}{name}.")


def _listed(names: Iterable[str]) -> str:
    """Returns names for a message: the first so many."""
    shown = list(names)
    more = f" and {len(shown) - COLUMNS_SHOWN} more" if len(shown) > COLUMNS_SHOWN else ""
    return ", ".join(map(repr, shown[:COLUMNS_SHOWN])) + more


def _read(spec: str, key: str) -> list[DataRow]:
    path = Path(spec)
    if path.suffix in DATA_SUFFIXES and path.is_dir():
        raise ConfigError(f"{key}: {spec} is a directory; name one file in it")

    if path.suffix in DATA_SUFFIXES and path.exists() and not path.is_file():
        raise ConfigError(
            f"{key}: {spec} is no file; a pipe can be read only once, and a run reads twice"
        )

    if path.suffix in DATA_SUFFIXES:
        try:
            require_no_pointer(path)
        except ValueError as error:
            raise ConfigError(f"{key}: {error}") from None

    if path.suffix == ".jsonl":
        return list(_read_jsonl(path, f"{key}: {spec}"))

    if path.suffix == ".parquet":
        return _numbered(read_parquet(path, f"{key}: {spec}"), f"{key}: {spec}")

    if not names_a_data_set(spec):
        raise ConfigError(
            f"{key}: {spec} must be .jsonl (a JSON object a line), .parquet, or the name of "
            f"a data set; files that end in {path.suffix or 'nothing'} are not read by themselves, "
            "but a folder of them may be a data set: FOLDER:train"
        )

    return _numbered(_read_named(spec, key), f"{key}: {spec}")


def _named(row: DataRow, names: Mapping[str, str]) -> DataRow:
    """Returns a row whose columns play the roles of ``names``, with its id in its place."""
    named = replace(row, names=names)
    row_id = named.get("id")
    if not isinstance(row_id, str | int):
        return named

    return replace(named, where=f"{row.where} (id {json.dumps(row_id)[:60]})")


def _read_jsonl(path: Path, where: str) -> Iterator[DataRow]:
    content = path.read_bytes()
    try:
        # splitlines() would cut at U+2028 inside a string
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{where}:{line}: is not UTF-8: {error.reason} at byte {error.start} of the file"
        ) from None

    for number, text in enumerate(lines, start=1):
        if text.strip():
            columns = _parse(text, f"{where}:{number}")
            yield DataRow(where=f"{where}:{number}", number=number, columns=columns)


def _parse(line: str, where: str) -> Mapping[str, object]:
    """Parses one line as an object.

    Raises:
        ConfigError: it is none, or names a field twice.
    """

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ConfigError(f"{where}: names {twice!r} twice; which one counts?")

        return fields

    try:
        row = parse_json(line, unique)
    except JsonError as error:
        hint = "; every line must be one object" if str(error).startswith("is not JSON") else ""
        raise ConfigError(f"{where}: {error}{hint}") from None

    if not isinstance(row, dict):
        raise ConfigError(
            f'{where}: must be an object such as {{"prompt": "..."}}, is {json.dumps(row)[:40]}'
        )

    return row


def _read_named(spec: str, key: str) -> list[Mapping[str, object]]:
    import pyarrow
    from datasets.table import CastError

    name = parse_data_name(key, spec)

    try:
        rows = load_named(name)
        kind = pyarrow.struct(list(rows.features.arrow_schema))
        return [cast(Mapping[str, object], as_written(row, kind)) for row in rows]
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None
    except Exception as error:  # noqa: BLE001 - a data set may run code of its own, which raises what it likes
        if "load_from_disk" in str(error):
            raise ConfigError(
                f"{key}: {spec} was written by save_to_disk; write it with to_parquet, and name "
                "that file"
            ) from None

        cause = error.__cause__  # of a file that is broken, or another one than the first
        if isinstance(cause, CastError):
            own = set(cause.table_column_names) ^ set(cause.requested_column_names)
            raise ConfigError(
                f"{key}: data set {spec}: a file of it has other columns than the first one "
                f"({_listed(sorted(own))}); name its files one by one, in a list"
            ) from None

        hint = "" if name.subset or cause else "; a subset is named as NAME:SUBSET:SPLIT"
        reason = str(cause or error) or type(cause or error).__name__
        raise ConfigError(f"{key}: data set {spec} cannot be loaded: {reason}{hint}") from None


def _numbered(rows: Iterable[Mapping[str, object]], where: str) -> list[DataRow]:
    """Numbers rows that are not lines of JSON. In an Arrow table every object of a column has every
    key; those without a value are removed.
    """
    numbered = []
    for number, row in enumerate(rows, start=1):
        values = {name: _pruned(value) for name, value in row.items()}
        numbered.append(
            DataRow(
                where=f"{where}: row {number}",
                number=number,
                columns=values,
            )
        )

    return numbered


def _pruned(value: object) -> object:
    if isinstance(value, Mapping):
        return {name: _pruned(inner) for name, inner in value.items() if inner is not None}

    if isinstance(value, list):
        return [_pruned(inner) for inner in value]

    return value
