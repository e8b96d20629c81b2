"""MLflow's scoring protocol: from a body to the answer's body, in one thread.

MLflow parses the tables; lists go past it, and errors are written here, so that none carries a
traceback or the caller's data. Knows no sockets and no routes.
"""

from __future__ import annotations

import csv
import json
import sys
import time
from collections.abc import Mapping
from functools import lru_cache
from io import BytesIO, StringIO
from typing import Any, NamedTuple

from mlflow_pt_deploy.errors import RequestError
from mlflow_pt_deploy.serving.parquet import check_unpacked
from mlflow_pt_deploy.serving.pyfunc import scoring_error
from mlflow_pt_deploy.serving.rows import check_names
from mlflow_pt_deploy.serving.ticket import Caller, seconds_left
from mlflow_pt_deploy.serving.version import Version

_JSON, _CSV, _PARQUET = "application/json", "text/csv", "application/vnd.apache.parquet"
_LISTS = ("inputs", "instances")
_FORMATS = (*_LISTS, "dataframe_split", "dataframe_records")


class Answer(NamedTuple):
    """What goes back.

    Attributes:
        status: The HTTP status.
        body: JSON.
        error: MLflow's error code, empty where all went well.
        headers: More headers.
        content_type: Of the body.
        version: What answered, where a model was asked.
    """

    status: int
    body: bytes
    error: str = ""
    headers: tuple[tuple[bytes, bytes], ...] = ()
    content_type: bytes = b"application/json"
    version: Version | None = None


def failure(status: int, error: str, message: str, *headers: tuple[bytes, bytes]) -> Answer:
    """An error in MLflow's form."""
    body = json.dumps({"error_code": error, "message": message}).encode()
    return Answer(status, body, error, headers)


LATER = (b"retry-after", b"1")
LEFT = failure(499, "CANCELLED", "the client left")
DEADLINE_HEADER = b"x-deadline-ms"


@lru_cache(maxsize=256)
def patience(header: bytes | None) -> float | None:
    """Seconds that a client waits, from his milliseconds; nonsense is none."""
    if header is None or not header.isdigit() or len(header) > 9:
        return None
    return int(header) / 1000


def time_left(version: Version, header: bytes | None) -> float | None:
    """Seconds for a request that comes now, as its header and the version's limits have it."""
    return seconds_left(version.pyfunc.batcher.limits, patience(header))


def deadline(header: bytes | None) -> float | None:
    """The end of a client's patience, by `time.monotonic`."""
    seconds = patience(header)
    return None if seconds is None else time.monotonic() + seconds


def answer(version: Version, body: bytes, content_type: str, caller: Caller) -> Answer:
    """Score one body; never raises."""
    try:
        data, params = _parse(version, body, content_type)
        predictions = version.pyfunc.predict(data, params, caller=caller)
        return Answer(200, json.dumps({"predictions": predictions}).encode(), version=version)
    except Exception as error:
        return failed(version, error)


def failed(version: Version, error: Exception) -> Answer:
    """An error as an answer."""
    told = scoring_error(error)
    status = 415 if isinstance(error, _UnsupportedMediaError) else told.status
    later = (LATER,) if status == 429 else ()
    text, code = told.serialize_as_json().encode(), str(told.error_code)
    return Answer(status, text, code, later, version=version)


class _UnsupportedMediaError(RequestError):
    """The body is of a type that MLflow's protocol does not know."""


def _parse(version: Version, body: bytes, content_type: str) -> tuple[Any, Any]:
    """Data and params of a body."""
    media, _, rest = (part.strip().lower() for part in content_type.partition(";"))
    charset = rest.removeprefix("charset=").strip('"') or "utf-8"
    if media not in (_JSON, _CSV, _PARQUET) or charset not in ("utf-8", "utf8"):
        raise _UnsupportedMediaError(
            f"'Content-Type' must be {_JSON}, {_CSV} or {_PARQUET}, and the text UTF-8"
        )
    if media == _JSON:
        return _parse_json(body, version.inputs, version.pyfunc.loaded.preprocessor.column)
    try:
        if media == _PARQUET:
            from mlflow.pyfunc import scoring_server

            check_unpacked(body, version.pyfunc.options.queue_rows)
            return scoring_server.parse_parquet_input(BytesIO(body)), None
        return parse_csv(body, version.pyfunc.loaded.preprocessor.column), None
    except RequestError:
        raise
    except Exception as error:
        raise RequestError(f"the body cannot be read as {media}") from error


def parse_csv(body: bytes, column: str) -> Mapping[str, list[str]]:
    """Read the column that the model takes, each cell as it stands there.

    MLflow reads CSV with pandas, which takes a column of 123, TRUE or NA for something other than
    texts, depending on the other rows.

    Raises:
        RequestError: A line does not fit, or the column is missing.
        Exception: It is no UTF-8.
    """
    csv.field_size_limit(sys.maxsize)  # of the whole process; the body's length is limited
    reader = csv.reader(StringIO(body.decode("utf-8-sig"), newline=""), strict=True)
    header: list[str] = []
    cells: list[str] = []
    place = 0
    try:
        for row in reader:
            if not row:  # an empty line; an empty text is ""
                continue
            if not header:
                header = row
                check_names(header, column)
                if column not in header:
                    raise RequestError(
                        f"the column '{column}' is missing; write the names of the columns into "
                        "the first line, with commas between"
                    )
                place = header.index(column)
            elif len(row) == len(header):
                cells.append(row[place])
            else:
                cells_here = "1 cell" if len(row) == 1 else f"{len(row)} cells"
                raise RequestError(
                    f"line {reader.line_num} of the CSV has {cells_here} and its header "
                    f'{len(header)}; put texts with commas or quotes in double quotes ("...")'
                )
    except csv.Error as error:
        raise RequestError(
            f"the body cannot be read as {_CSV}: quotes do not match near line {reader.line_num}; "
            'put texts with commas or quotes in double quotes ("..."), and double the quotes inside'
        ) from error
    return {column: cells}


def _parse_json(body: bytes, schema: Any, column: str) -> tuple[Any, Any]:
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError("the body is not valid JSON") from error
    given = [name for name in _FORMATS if isinstance(request, dict) and name in request]
    if len(given) != 1:
        raise RequestError(f"the body must be an object with exactly one of {', '.join(_FORMATS)}")
    params = request.get("params")
    if params is not None and not isinstance(params, dict):
        raise RequestError("'params' must be an object")
    # A second text beside the rows would be dropped as silently as one in them.
    check_names([column, *(request.keys() - {given[0]}), *(params or {})], column)
    if given[0] in _LISTS and schema is None:
        # MLflow would make a NumPy array of it, as wide in every row as the longest text: a few
        # megabytes of JSON become gigabytes.
        return request[given[0]], params
    from mlflow.pyfunc.scoring_server import infer_and_parse_data

    try:
        return infer_and_parse_data({given[0]: request[given[0]]}, schema), params
    except Exception as error:
        raise RequestError(f"'{given[0]}' is not in MLflow's format of that name") from error
