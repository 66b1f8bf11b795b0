"""Rows of Parquet files are read, with their values as they were written."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from eopd.config import ConfigError

if TYPE_CHECKING:
    import pyarrow


def read_parquet(path: Path, where: str) -> list[dict[str, object]]:
    """Reads all rows of a file.

    Raises:
        ConfigError: it is no Parquet file, has two columns of one name, or a value that cannot be
            read.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if twice := [name for name, number in Counter(names).items() if number > 1]:
            raise ConfigError(f"{where}: has two columns named {twice[0]!r}; which one counts?")

        table = file.read()
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise ConfigError(f"{where} cannot be read: {error}") from None

    columns = [_values(table.column(name), f"{where}: column {name}") for name in names]

    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def as_written(value: object, kind: "pyarrow.DataType") -> object:
    """Returns a value of a table; a float of less than 64 bits becomes the shortest number that rounds
    to it: 0.1, not 0.10000000149.
    """
    from pyarrow import types

    if value is None:
        return None

    if types.is_float32(kind) or types.is_float16(kind):
        narrow = np.float32 if types.is_float32(kind) else np.float16
        return float(str(narrow(float(str(value)))))

    if isinstance(value, list) and (
        types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    ):
        return [as_written(item, kind.value_type) for item in value]

    if isinstance(value, dict) and types.is_struct(kind):
        return {
            field.name: as_written(value[field.name], field.type)
            for field in kind
            if field.name in value
        }

    return value


def _values(column: "pyarrow.ChunkedArray", where: str) -> list[object]:
    """Returns the values of a column.

    Raises:
        ConfigError: a value is beyond what Python can hold, such as a time after the year 9999.
    """
    import pyarrow

    values = []

    for number, scalar in enumerate(column, start=1):
        try:
            values.append(as_written(scalar.as_py(), column.type))
        except (OverflowError, ValueError, KeyError, pyarrow.ArrowException) as error:
            raise ConfigError(
                f"{where}: row {number}: its {column.type} cannot be read ({error}); take "
                "the column out"
            ) from None

    return values
