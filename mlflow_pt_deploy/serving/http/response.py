"""Responses: status, body and headers, and the error form of MLflow's scoring protocol."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

Header = tuple[str, str]

RETRY_AFTER: Header = ("retry-after", "1")


class Response(NamedTuple):
    """A response.

    Attributes:
        status: HTTP status.
        body: Bytes of the body, JSON unless `content_type` says otherwise.
        error_code: MLflow's error code; empty for a success.
        headers: Headers besides content type and length.
        content_type: Media type of the body.
        model_version: The model version that computed it; empty if none did.
        predictions: The predictions in the body as JSON, one string per row.
        explained: Whether it holds explanations; its latency is not that of a prediction.
    """

    status: int
    body: bytes
    error_code: str = ""
    headers: tuple[Header, ...] = ()
    content_type: str = "application/json"
    model_version: str = ""
    predictions: Sequence[str] = ()
    explained: bool = False


def error_response(status: int, code: str, message: str, *headers: Header) -> Response:
    """An error in MLflow's form, ``{"error_code", "message"}``."""
    body = json.dumps({"error_code": code, "message": message}).encode()
    return Response(status, body, code, headers)


def json_response(content: object, status: int = 200) -> Response:
    """Any JSON document."""
    return Response(status, json.dumps(content).encode())


CLIENT_DISCONNECTED = error_response(499, "CANCELLED", "the client disconnected")
"""For metrics and log only: the client is gone."""
