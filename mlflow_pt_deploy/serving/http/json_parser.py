"""JSON bodies, parsed without pandas and without MLflow.

Formats of MLflow's scoring protocol: ``inputs``, ``instances``, ``dataframe_split``,
``dataframe_records``; see https://mlflow.org/docs/latest/ml/deployment/deploy-model-locally. Only
the column that the model reads is kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from mlflow_pt_deploy.errors import RequestError
from mlflow_pt_deploy.serving.model.inputs import check_names, column_index

FORMATS = ("inputs", "instances", "dataframe_split", "dataframe_records")
_FORMATS = frozenset(FORMATS)


class ParsedBody(NamedTuple):
    """Data for `inputs.parse_rows`, and the parameters."""

    data: Any
    params: Mapping[str, Any] | None


def parse_json(body: bytes, column: str) -> ParsedBody:
    """Parse a JSON body.

    Args:
        body: UTF-8.
        column: The column that the model reads, ``text`` or ``image``.

    Raises:
        RequestError: The body is not one of the formats. The message names the field and does not
            repeat the content.
    """
    request = load_json(body)
    given = request.keys() & _FORMATS if isinstance(request, dict) else set()
    if len(given) != 1:
        raise RequestError(f"the body must be an object with exactly one of {', '.join(FORMATS)}")
    params = request.get("params")
    if params is not None and not isinstance(params, dict):
        raise RequestError("'params' must be an object")
    # a second text beside the rows is an error too: it would be ignored without a message
    if len(request) > 1:
        check_names([column, *(request.keys() - given), *(params or {})], column)
    (name,) = given
    data = request[name]
    if name == "dataframe_split":
        data = _split_column(data, column)
    elif name == "dataframe_records" and not _is_list_of(data, dict):
        raise RequestError("'dataframe_records' must be a list of objects, one a row")
    return ParsedBody(data, params)


def load_json(body: bytes) -> Any:
    """Parse any JSON document.

    Raises:
        RequestError: It is not JSON, not UTF-8, or nested too deep.
    """
    try:
        return json.loads(body.decode())  # of bytes, json would guess the encoding first
    except (ValueError, RecursionError) as error:
        raise RequestError("the body is not valid JSON") from error


def _split_column(table: Any, column: str) -> list[Any]:
    """The rows of one column of ``{"columns": [...], "data": [[...], ...]}``."""
    names: Any = table.get("columns") if isinstance(table, dict) else None
    rows: Any = table.get("data") if isinstance(table, dict) else None
    if names is None and rows and _is_list_of(rows, list):
        names = list(range(len(rows[0])))  # as pandas names columns
    if not _is_list_of(names, str | int) or not _is_list_of(rows, list):
        raise RequestError(
            "'dataframe_split' must be an object with 'columns', a list of names, and 'data', a "
            "list of rows"
        )
    if any(len(row) != len(names) for row in rows):
        raise RequestError("'dataframe_split': every row of 'data' needs one value per column")
    if not names:
        return []
    index = column_index(names, column)
    return [row[index] for row in rows]


def _is_list_of(value: Any, kind: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)
