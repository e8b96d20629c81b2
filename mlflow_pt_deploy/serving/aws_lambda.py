"""AWS Lambda handler: a model behind a function, without a server, MLflow or PyTorch.

Events: a direct invocation with a body of MLflow's scoring protocol, and HTTP requests of a
function URL or HTTP API (format 2.0), of a REST API (format 1.0) and of a load balancer.
https://docs.aws.amazon.com/lambda/latest/dg/urls-invocation.html
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from mlflow_pt_deploy.artifacts import LoadedVariant
from mlflow_pt_deploy.errors import RequestError
from mlflow_pt_deploy.model_config import ServingOptions
from mlflow_pt_deploy.registry.mlmodel import read_mlmodel
from mlflow_pt_deploy.serving.http.json_parser import parse_json
from mlflow_pt_deploy.serving.model.errors import scoring_error
from mlflow_pt_deploy.serving.model.explaining import (
    PredictionExplainer,
    check_explainable,
    wants_explanation,
)
from mlflow_pt_deploy.serving.model.inference_service import InferenceService
from mlflow_pt_deploy.serving.model.inputs import parse_rows
from mlflow_pt_deploy.serving.model.loader import load_logged_variant
from mlflow_pt_deploy.serving.model.outputs import PredictionFormatter
from mlflow_pt_deploy.serving.platform import default_model
from mlflow_pt_deploy.system.regular_files import list_files

MAX_ROWS = 1024
"""Most rows of an event."""

_JSON = {"content-type": "application/json"}


def handler(event: Mapping[str, Any], context: object = None) -> dict[str, Any]:
    """Score the rows of an event.

    Args:
        event: See the module.
        context: Of Lambda; not used.

    Returns:
        ``{"predictions": [...]}``; for HTTP events a response with status, headers and body.

    Raises:
        RequestError: A direct event is invalid. HTTP events get the status 400 instead.
    """
    if not _is_http(event):
        return {"predictions": _score(json.dumps(event).encode())}
    if _method(event) != "POST":
        return _response(200, "{}")  # health checks of load balancers
    try:
        predictions = _score(_body(event))
    except Exception as error:
        known = scoring_error(error)
        return _response(known.status, known.body)
    return _response(200, json.dumps({"predictions": predictions}))


@cache
def load() -> LoadedVariant:
    """The model of this function; loaded once a process.

    Raises:
        ServingError: There is no model.
        PtDeployError: It is damaged or cannot run here.
    """
    root = Path(default_model(os.environ))
    list_files(root)
    return load_logged_variant(root, read_mlmodel(root), ServingOptions())


def _score(body: bytes) -> list[Any]:
    loaded = load()
    column = loaded.preprocessor.column
    data, params = parse_json(body, column)
    rows = parse_rows(data, column)
    if len(rows) > MAX_ROWS:
        raise RequestError(f"'{column}' has {len(rows)} rows; one event may have {MAX_ROWS}.")
    formatter = PredictionFormatter(loaded.labels)
    top_k = formatter.top_k(params)
    explain = wants_explanation(params)
    if explain:
        check_explainable(column, rows)
    predictions = list(formatter.to_objects(loaded.logits(rows), top_k))
    if explain:
        service = InferenceService(loaded, ServingOptions())
        PredictionExplainer(service).explain(rows, predictions, bounded=False)
    return predictions


def _is_http(event: Mapping[str, Any]) -> bool:
    return isinstance(event.get("requestContext"), Mapping)


def _method(event: Mapping[str, Any]) -> str:
    http = event["requestContext"].get("http")
    method = http.get("method") if isinstance(http, Mapping) else event.get("httpMethod")
    return str(method or "POST").upper()


def _body(event: Mapping[str, Any]) -> bytes:
    text = event.get("body") or ""
    if not isinstance(text, str):
        raise RequestError("the body of the event is not a string")
    if not event.get("isBase64Encoded"):
        return text.encode()
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError("the body of the event is not base64") from error


def _response(status: int, body: str) -> dict[str, Any]:
    return {"statusCode": status, "headers": _JSON, "body": body, "isBase64Encoded": False}


if "AWS_LAMBDA_RUNTIME_API" in os.environ:
    load()  # while Lambda starts the process, which it does not bill as a request
