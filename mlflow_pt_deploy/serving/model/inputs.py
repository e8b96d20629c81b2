"""Parses the rows of a request from every type in which MLflow passes data.

Error messages name the field and the row, not the content. Image files are decoded later, by the
preprocessor.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from mlflow_pt_deploy.data.columns import find_pair_columns
from mlflow_pt_deploy.errors import RequestError
from mlflow_pt_deploy.preprocessing import Row

EXAMPLES = {"text": "some text", "image": "'$(base64 -w0 FILE)'"}
"""Example rows for a request body within single quotes of a shell."""

MAX_COLUMNS = 10_000
"""Most columns of a table, or different keys of its records; checking names takes 10 µs each."""

_EXPECTED = {
    "text": "every row must be a text",
    "image": "every row must be an image file's bytes, or their base64",
}
# names that MLflow, Spark and MLflow's evaluators give to the column of a plain list
_UNNAMED = (0, "0", "feature_1")
_PAIRS = "pairs are not supported"
# MLflow's tools read CSV with pandas, which converts 123, TRUE and NA.
_CONVERTED = (
    ". If the rows come from a CSV file, it was read with type inference: read it with dtype=str "
    "and keep_default_na=False, or send JSON"
)
_FILE = (str, bytes, bytearray, memoryview)


def parse_rows(data: object, column: str) -> list[Row]:
    """Parse rows from one row, a list, Series, array, dict or table.

    A row is a text or, for image models, the bytes of a file or their base64, which MLflow's
    protocol uses for the type `binary`. Other columns are ignored, as MLflow ignores columns that a
    signature does not name, unless they hold a second text or image of the row.

    Args:
        data: Data that MLflow passes to `predict`.
        column: ``text`` or ``image``.

    Raises:
        RequestError: There are no rows, the column is missing, a row has several texts, is null or
            has another type.
    """
    if column == "text" and type(data) is list and set(map(type, data)) == {str}:
        return data  # the common request
    if hasattr(data, "to_pandas"):  # Arrow, polars, datasets
        data = data.to_pandas()
    rows = _column(data, column)
    if not rows:
        raise RequestError(f"'{column}' is empty; send at least one row")
    for number, row in enumerate(rows):
        if not isinstance(row, str if column == "text" else _FILE):
            cause = _CONVERTED if column == "text" and hasattr(data, "columns") else ""
            expected = _EXPECTED[column]
            raise RequestError(f"'{column}' row {number} is {_type_name(row)}; {expected}{cause}")
    if column == "text":
        return rows
    return [_file_bytes(row, number) for number, row in enumerate(rows)]


def check_names(names: Iterable[object], column: str) -> None:
    """Reject columns that hold a second text or image of each row.

    Args:
        names: Columns of a table, or fields of a record.
        column: Name of the column that the model reads.

    Raises:
        RequestError: There is such a column, by a list of common names, or there are more than
            `MAX_COLUMNS`.
    """
    names = list(islice(names, MAX_COLUMNS + 1))
    if len(names) > MAX_COLUMNS:
        raise RequestError(f"there are more than {MAX_COLUMNS} columns; send '{column}' only")
    kind, found = find_pair_columns(names)
    if found:
        columns = " and ".join(f"'{name}'" for name in found[:4])
        raise RequestError(
            f"{columns} are several {kind}s per row; the model reads one '{column}' and {_PAIRS}"
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
        data = _to_list(_flat(data, column), column)
    if isinstance(data, Sequence) and not isinstance(data, _FILE):
        records = [row for row in data if isinstance(row, Mapping)]
        if records:
            check_names(dict.fromkeys(name for record in records for name in record), column)
        return [_cell(row, column) for row in data]
    return [data]


def _file_bytes(row: str | bytes | bytearray | memoryview, number: int) -> bytes:
    """The bytes of an image file, given as bytes or base64."""
    if not isinstance(row, str):
        return bytes(row)
    try:
        # a data URL's prefix, "data:image/png;base64,", and line breaks are allowed
        return base64.b64decode("".join(row.rpartition(",")[2].split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(
            f"'image' row {number} is a text that is not base64; {_EXPECTED['image']}"
        ) from error


def column_index(names: Sequence[object], column: str) -> int:
    """Index of the column that the model reads among a table's columns.

    Raises:
        RequestError: It is missing or ambiguous, or there is a second text or image.
    """
    check_names(names, column)
    if column in names:
        return names.index(column)
    if any(name in names for name in _UNNAMED):
        if len(names) == 1:
            return 0
        raise RequestError(
            f"the rows have {len(names)} columns without the name '{column}'; name the "
            f"column that the model reads ({_PAIRS})"
        )
    raise RequestError(f"the column '{column}' is missing")


def _table_column(table: Any, column: str) -> Any:
    names = list(table.columns)
    return table.iloc[:, column_index(names, column)] if names else []


def _flat(array: Any, column: str) -> Any:
    """Reshape (rows, 1) to (rows,); a flat array stays as it is."""
    if array.ndim == 2 and array.shape[1] == 1:
        return array[:, 0]
    if array.ndim > 1:
        raise RequestError(
            f"'{column}' must be a flat list of {column}s, not a nested one; {_PAIRS}"
        )
    return array


def _to_list(array: Any, column: str) -> Any:
    """Convert a flat array to Python values."""
    try:
        return array.tolist()
    except Exception as error:  # Arrow validates the texts of a Parquet file only here
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


def _type_name(value: object) -> str:
    """Type of a value for an error message, without its content."""
    if value is None or (isinstance(value, float) and math.isnan(value)):  # NaN: pandas' null
        return "null"
    if isinstance(value, (bool, int, float)):
        return "a number or a boolean"
    if isinstance(value, list | tuple) and len(value) > 1 and isinstance(value[0], str):
        return f"a list of {len(value)} ({_PAIRS})"
    names = {"list": "a list", "tuple": "a list", "dict": "an object"}
    return names.get(type(value).__name__, "of another type")
