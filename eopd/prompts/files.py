"""Rows are read from JSONL files, Parquet files, and data sets by name.

A row has its columns, and the place where it stands, which a message on it begins with.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from eopd.config import ConfigError
from eopd.config.base import DATA_SUFFIXES
from eopd.config.json_text import JsonError, parse_json
from eopd.config.pointer import require_no_pointer
from eopd.prompts.arrow import as_written, read_parquet
from eopd.prompts.named import load_named, names_a_data_set, parse_data_name


@dataclass(frozen=True, slots=True, kw_only=True)
class DataRow:
    """A data row is one row of a data set.

    ``number`` is its line in a JSONL file, and elsewhere its number, counted from 1. ``where``
    names the key of the config, the data set, and the row.
    """

    where: str
    number: int
    columns: Mapping[str, object]


def read_data(spec: str, key: str = "prompts.data") -> list[DataRow]:
    """Reads all rows of a ``.jsonl`` or ``.parquet`` file, or of a data set by name.

    A name is ``NAME``, ``NAME:SPLIT`` or ``NAME:SUBSET:SPLIT``, e.g. ``openai/gsm8k:main:train``;
    the split is ``train`` where none is named, and a revision stands behind the name.

    Args:
        spec: The file or the name.
        key: The key of the config that names it, for messages.

    Raises:
        ConfigError: it is missing, unreadable, empty, or of another kind.
    """
    if not spec.strip() or "\0" in spec:
        raise ConfigError(
            f"{key}: must be a .jsonl or .parquet file or the name of a data set (is {spec!r})"
        )

    try:
        rows = _read(spec, key)
    except OSError as error:
        raise ConfigError(f"{key}: {spec} cannot be read ({error.strerror or error})") from None

    if not rows:
        raise ConfigError(f"{key}: {spec} has no rows")

    return rows


def _read(spec: str, key: str) -> list[DataRow]:
    path = Path(spec)
    if path.suffix in DATA_SUFFIXES and path.is_dir():
        raise ConfigError(f"{key}: {spec} is a directory; name one file in it")

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
            f"a data set; files that end in {path.suffix or 'nothing'} are not read"
        )

    return _numbered(_read_named(spec, key), f"{key}: {spec}")


def _row(where: str, number: int, columns: Mapping[str, object]) -> DataRow:
    row_id = columns.get("id")
    suffix = f" (id {json.dumps(row_id)[:60]})" if isinstance(row_id, str | int) else ""
    return DataRow(where=where + suffix, number=number, columns=columns)


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
            yield _row(f"{where}:{number}", number, _parse(text, f"{where}:{number}"))


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

    name = parse_data_name(key, spec)

    try:
        rows = load_named(name)
        kind = pyarrow.struct(list(rows.features.arrow_schema))
        return [cast(Mapping[str, object], as_written(row, kind)) for row in rows]
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None
    except Exception as error:  # noqa: BLE001 - a data set may run code of its own, which raises what it likes
        hint = "" if name.subset else "; a subset is named as NAME:SUBSET:SPLIT"
        raise ConfigError(
            f"{key}: data set {spec} cannot be loaded: {error or type(error).__name__}{hint}"
        ) from None


def _numbered(rows: Iterable[Mapping[str, object]], where: str) -> list[DataRow]:
    """Numbers the rows of an Arrow table. There every object of a column has every key; those without
    a value are removed.
    """
    numbered = []
    for number, row in enumerate(rows, start=1):
        values = {name: _pruned(value) for name, value in row.items()}
        numbered.append(_row(f"{where}: row {number}", number, values))

    return numbered


def _pruned(value: object) -> object:
    if isinstance(value, Mapping):
        return {name: _pruned(inner) for name, inner in value.items() if inner is not None}

    if isinstance(value, list):
        return [_pruned(inner) for inner in value]

    return value
