"""Rows of a request, out of every shape in which MLflow hands data over.

A message names the field and the row, never the content: that is the user's data. What an image
file holds, the preprocessor says.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mlflow_pt_deploy.columns import paired
from mlflow_pt_deploy.errors import RequestError
from mlflow_pt_deploy.preprocess import Row

EXAMPLES = {"text": "some text", "image": "'$(base64 -w0 FILE)'"}
"""A row as a shell puts it between single quotes into the body of a request."""

_WANTED = {
    "text": "every row must be a text",
    "image": "every row must be an image file's bytes, or their base64",
}
# MLflow, Spark and MLflow's evaluators name the column of a bare list so.
_UNNAMED = (0, "0", "feature_1")
_PAIRS = "pairs are not supported"
# MLflow's own tools read CSV with pandas, which takes 123, TRUE and NA for something else.
_GUESSED = (
    ". Where a CSV was read, its text was taken for a number or a gap: read it with dtype=str and "
    "keep_default_na=False, or send JSON"
)
_FILE = (str, bytes, bytearray, memoryview)


def read_rows(data: object, column: str) -> list[Row]:
    """Rows from one row, a list, Series, array, dict or table.

    A row is a text or, for models of images, a file's bytes or their base64, which is what
    MLflow's protocol makes of the type `binary`. Columns of other names are ignored, as MLflow does
    with columns that a signature does not name, unless they are a second text or image of the row.

    Args:
        data: What MLflow was given.
        column: ``text`` or ``image``.

    Raises:
        RequestError: No rows, no such column, several texts a row, a null or something else.
    """
    if hasattr(data, "to_pandas"):  # Arrow, polars, datasets
        data = data.to_pandas()
    rows = _column(data, column)
    if not rows:
        raise RequestError(f"'{column}' is empty; send at least one row")
    for number, row in enumerate(rows):
        if not isinstance(row, str if column == "text" else _FILE):
            cause = _GUESSED if column == "text" and hasattr(data, "columns") else ""
            raise RequestError(f"'{column}' row {number} is {_kind(row)}; {_WANTED[column]}{cause}")
    if column == "text":
        return rows
    return [_file(row, number) for number, row in enumerate(rows)]


def check_names(names: Iterable[object], column: str) -> None:
    """Refuse columns that hold a second text or image of each row.

    Args:
        names: Of a table's columns, or of a record's fields.
        column: The one that the model reads.

    Raises:
        RequestError: There is one; names those that a list of usual names knows.
    """
    kind, found = paired(names)
    if found:
        columns = " and ".join(f"'{name}'" for name in found[:4])
        raise RequestError(
            f"{columns} are several {kind}s a row; the model reads one '{column}' and {_PAIRS}"
        )


def _column(data: Any, column: str) -> list[Any]:
    """The rows of a column, unchecked."""
    if isinstance(data, Iterator):
        data = list(data)
    if isinstance(data, Mapping):
        check_names(data, column)
        data = _cell(data, column)
    elif hasattr(data, "columns"):  # pandas, without importing it
        data = _table_column(data, column)
    if hasattr(data, "tolist") and not isinstance(data, _FILE):
        data = _listed(_flat(data, column), column)
    if isinstance(data, Sequence) and not isinstance(data, _FILE):
        records = [row for row in data if isinstance(row, Mapping)]
        if records:
            check_names(dict.fromkeys(name for record in records for name in record), column)
        return [_cell(row, column) for row in data]
    return [data]


def _file(row: str | bytes | bytearray | memoryview, number: int) -> bytes:
    """An image file's bytes, from themselves or from base64."""
    if not isinstance(row, str):
        return bytes(row)
    try:
        # What browsers write in front of it, "data:image/png;base64,", may stay, and line breaks.
        return base64.b64decode("".join(row.rpartition(",")[2].split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(
            f"'image' row {number} is a text that is not base64; {_WANTED['image']}"
        ) from error


def _table_column(table: Any, column: str) -> Any:
    names = list(table.columns)
    if not names:
        return []
    check_names(names, column)
    if column in names:
        return table.iloc[:, names.index(column)]
    for name in _UNNAMED:
        if name in names:
            if len(names) > 1:
                raise RequestError(
                    f"the rows have {len(names)} columns without the name '{column}'; name the "
                    f"column that the model reads ({_PAIRS})"
                )
            return table.iloc[:, 0]
    raise RequestError(f"the column '{column}' is missing")


def _flat(array: Any, column: str) -> Any:
    """(rows, 1) as (rows,); anything flat unchanged."""
    if array.ndim == 2 and array.shape[1] == 1:
        return array[:, 0]
    if array.ndim > 1:
        raise RequestError(
            f"'{column}' must be a flat list of {column}s, not a nested one; {_PAIRS}"
        )
    return array


def _listed(array: Any, column: str) -> Any:
    """A flat array's values as Python's own."""
    try:
        return array.tolist()
    except Exception as error:  # Arrow's: what a Parquet file calls texts is looked at only now
        raise RequestError(f"'{column}' cannot be read; texts must be UTF-8") from error


def _cell(row: Any, column: str) -> Any:
    """One row of a list, which may be a record or a list of one."""
    if isinstance(row, Mapping):
        if column not in row:
            raise RequestError(f"the column '{column}' is missing")
        return row[column]
    if isinstance(row, list | tuple) and len(row) == 1:
        return row[0]
    return row


def _kind(value: object) -> str:
    """What a value is, in words that do not repeat it."""
    if value is None or (isinstance(value, float) and math.isnan(value)):  # NaN: pandas' null
        return "null"
    if isinstance(value, (bool, int, float)):
        return "a number or a truth value"
    if isinstance(value, list | tuple) and len(value) > 1 and isinstance(value[0], str):
        return f"a list of {len(value)} ({_PAIRS})"
    names = {"list": "a list", "tuple": "a list", "dict": "an object"}
    return names.get(type(value).__name__, "of another type")
