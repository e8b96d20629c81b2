"""MLflow's scoring protocol: request bodies to rows, errors to responses."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from mlflow_pt_deploy.errors import RequestError
from mlflow_pt_deploy.preprocessing import Row
from mlflow_pt_deploy.serving.batching.request import Encoded
from mlflow_pt_deploy.serving.http.csv_parser import parse_csv
from mlflow_pt_deploy.serving.http.json_parser import ParsedBody, parse_json
from mlflow_pt_deploy.serving.http.parquet_reader import ParquetReader
from mlflow_pt_deploy.serving.http.request import Headers
from mlflow_pt_deploy.serving.http.response import RETRY_AFTER, Response
from mlflow_pt_deploy.serving.model.errors import scoring_error
from mlflow_pt_deploy.serving.model.inputs import parse_rows

if TYPE_CHECKING:
    from mlflow_pt_deploy.serving.model.inference_service import InferenceService

JSON, CSV, PARQUET = "application/json", "text/csv", "application/vnd.apache.parquet"

PARQUET_READER = ParquetReader()

MAX_TEXT_CHARS = 100_000
"""Longest text. Tokenizing takes time in proportion, even if the model truncates to 128 tokens."""

MAX_INLINE_BYTES = 16 * 2**10
"""Longer bodies are parsed and encoded on a thread, so that they do not block the event loop."""


class UnsupportedMediaError(RequestError):
    """The content type or encoding is not part of MLflow's protocol."""


class ScoringInput(NamedTuple):
    """Rows of a request; `encoded` is None until they are encoded."""

    rows: list[Row]
    top_k: int
    encoded: list[Encoded] | None = None


def media_type(headers: Headers) -> str:
    """The media type of a request body.

    Raises:
        UnsupportedMediaError: It is not one of MLflow's, not UTF-8, or compressed.
    """
    media, _, parameters = (headers.get("content-type") or "").partition(";")
    media = media.strip().lower()
    charset = "utf-8"
    for parameter in parameters.split(";"):
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "charset":
            charset = value.strip().strip('"').lower()
    if media not in (JSON, CSV, PARQUET) or charset not in ("utf-8", "utf8"):
        raise UnsupportedMediaError(
            f"'Content-Type' must be {JSON}, {CSV} or {PARQUET}, and the text UTF-8"
        )
    if (headers.get("content-encoding") or "identity").lower() != "identity":
        raise UnsupportedMediaError(
            "'Content-Encoding' is not supported; send the body uncompressed"
        )
    return media


def is_small(service: InferenceService, body: bytes, media: str) -> bool:
    """Whether parsing and encoding are fast enough to run on the event loop."""
    return (
        media == JSON
        and len(body) <= MAX_INLINE_BYTES
        and service.loaded.preprocessor.column == "text"
    )


def parse(service: InferenceService, body: bytes, media: str) -> ScoringInput:
    """Parse a body into rows and parameters.

    Raises:
        RequestError: The body is wrong. The message names the field and the row, not the content.
    """
    data, params = _parse(service, body, media)
    rows = parse_rows(data, service.loaded.preprocessor.column)
    max_rows = service.options.queue_rows
    if len(rows) > max_rows:
        column = service.loaded.preprocessor.column
        raise RequestError(
            f"'{column}' has {len(rows)} rows; one request may have {max_rows} (queue_rows). "
            "Send several smaller requests."
        )
    for number, row in enumerate(rows):
        if isinstance(row, str) and len(row) > MAX_TEXT_CHARS:
            raise RequestError(
                f"'{service.loaded.preprocessor.column}' row {number} has {len(row)} characters; "
                f"a text may have {MAX_TEXT_CHARS}. Shorten it."
            )
    return ScoringInput(rows, service.formatter.top_k(params))


def parse_and_encode(service: InferenceService, body: bytes, media: str) -> ScoringInput:
    """`parse`, then encode the rows; runs on a thread.

    Raises:
        RequestError: See `parse`.
    """
    found = parse(service, body, media)
    return found._replace(encoded=service.encode(found.rows))


def error_to_response(error: Exception, model_version: str) -> Response:
    """Convert any error to a response without client data."""
    known = scoring_error(error)
    unsupported = isinstance(error, UnsupportedMediaError)
    status = 415 if unsupported else known.status
    headers = (RETRY_AFTER,) if status == 429 else ()
    if unsupported:
        headers = (("accept-encoding", "identity"),)
    return Response(status, known.body.encode(), known.code, headers, model_version=model_version)


def _parse(service: InferenceService, body: bytes, media: str) -> ParsedBody:
    column = service.loaded.preprocessor.column
    if media == JSON:
        return parse_json(body, column)
    rows = PARQUET_READER.read if media == PARQUET else parse_csv
    return ParsedBody({column: rows(body, column, service.options.queue_rows)}, None)
