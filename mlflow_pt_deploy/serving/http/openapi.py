"""The OpenAPI 3.1 document of the server.

Written by hand; a test sends requests to every path and compares the responses with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_ERRORS = {
    400: "The request is invalid; the message names the field without its content",
    401: "The token is missing or wrong",
    404: "There is no such path, or this version of the model does not serve",
    405: "The method is not allowed for this path",
    408: "The body did not arrive in time",
    413: "The body is too long",
    415: "The content type or encoding is not part of the protocol",
    429: "The server is overloaded; retry later",
    500: "The model failed on this request",
    503: "The model is loading, or the device has no memory for it; retry after Retry-After",
    504: "The deadline passed",
}
_SCORING = (400, 401, 405, 408, 413, 415, 429, 500, 503, 504)
_ADMIN = (401, 405, 501)
_PROBES = {
    "/ping": "Readiness, as an empty line",
    "/health": "Readiness, as an empty line",
    "/version": "MLflow's version",
    "/livez": "Liveness: the process answers and no model hangs",
    "/readyz": "Readiness: in every replica all models are loaded and warm, or evicted",
    "/openapi.json": "This document",
    "/v2/health/live": "Liveness, in the form of the Open Inference Protocol",
    "/v2/health/ready": "Readiness, in the form of the Open Inference Protocol",
}


def document(models: Iterable[str], column: str | None) -> dict[str, Any]:
    """The document of a server.

    Args:
        models: Names of its models.
        column: Input column of the first model; None while it is loading.
    """
    from mlflow_pt_deploy._version import __version__

    names = list(models)
    schemas = _schemas(column or "text") | _tensor_schemas() | _feedback_schemas()
    admin = ["/metrics", "/model", "/models", *(f"/models/{name}" for name in names)]
    scoring = [
        f"{owner}/{what}"
        for owner in ("", *(f"/models/{name}" for name in names))
        for what in ("invocations", "explain")
    ]
    probes = {path: {"get": _read(about, (405, 503))} for path, about in _PROBES.items()}
    return {
        "openapi": "3.1.0",
        "info": {"title": "pt-deploy serve", "version": __version__},
        "paths": {
            **{path: {"post": _score()} for path in scoring},
            **probes,
            **{path: {"get": _read("Admin page", _ADMIN)} for path in admin},
            "/feedback": {"post": _feedback()},
            **_open_inference(names),
        },
        "components": {
            "schemas": schemas,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _open_inference(names: Iterable[str]) -> dict[str, Any]:
    """The paths of the Open Inference Protocol, besides its probes."""
    server = _read("Name and version of this server", (401, 405), "InferenceError")
    paths: dict[str, Any] = {"/v2": {"get": server}}
    version = {"name": "version", "in": "path", "required": True, "schema": {"type": "string"}}
    for name in names:
        for part, more in (("", {}), ("/versions/{version}", {"parameters": [version]})):
            root = f"/v2/models/{name}{part}"
            metadata = _read("Tensors of the model", (401, 404, 405, 503), "InferenceError")
            ready = _read("Whether the model is ready", (404, 405, 503), "InferenceError")
            paths[root] = more | {"get": metadata}
            paths[f"{root}/ready"] = more | {"get": ready}
            paths[f"{root}/infer"] = more | {"post": _infer()}
    return paths


def _score() -> dict[str, Any]:
    """The operation that scores rows in MLflow's protocol."""
    request = {
        "text/csv": {"schema": {"type": "string"}},
        "application/vnd.apache.parquet": {"schema": {"type": "string", "format": "binary"}},
    }
    return _scoring(("Request", "Predictions", "Error"), request, _SCORING)


def _infer() -> dict[str, Any]:
    """The operation that scores a tensor."""
    request = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    schemas = ("InferenceRequest", "InferenceResponse", "InferenceError")
    return _scoring(schemas, request, (404, *_SCORING))


def _scoring(
    schemas: tuple[str, str, str], media: Mapping[str, Any], statuses: Iterable[int]
) -> dict[str, Any]:
    """An operation that scores rows.

    Args:
        schemas: Of the request, the response and an error.
        media: Media types of the request besides JSON.
        statuses: Of errors.
    """
    request, response, error = schemas
    content = {"application/json": {"schema": _reference(request)}, **media}
    good = {
        "description": "One prediction per row, in order",
        "headers": {"X-Model-Version": {"schema": {"type": "string"}}},
        "content": {"application/json": {"schema": _reference(response)}},
    }
    return {
        "summary": "Score rows",
        "security": [{}, {"token": []}],
        "parameters": [
            {
                "name": "X-Deadline-Ms",
                "in": "header",
                "description": "Milliseconds that the client waits; ignored if not a number",
                "schema": {"type": "string"},
            }
        ],
        "requestBody": {"required": True, "content": content},
        "responses": {"200": good} | _failures(statuses, error),
    }


def _feedback() -> dict[str, Any]:
    """The operation that takes the right labels of served rows."""
    taken = {"application/json": {"schema": _reference("FeedbackResult")}}
    about = "How many labels were taken, and which were not"
    return {
        "summary": "Send the right labels of served rows",
        "security": [{}, {"token": []}],
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": _reference("Feedback")}},
        },
        "responses": {"200": {"description": about, "content": taken}}
        | _failures((400, 401, 404, 405, 408, 413, 503), "Error"),
    }


def _read(about: str, statuses: Iterable[int], error: str = "Error") -> dict[str, Any]:
    return {
        "summary": about,
        "security": [{}, {"token": []}],
        "responses": {"200": {"description": about}} | _failures(statuses, error),
    }


def _failures(statuses: Iterable[int], error: str) -> dict[str, Any]:
    content = {"application/json": {"schema": _reference(error)}}
    found: dict[str, Any] = {}
    for status in statuses:
        about = _ERRORS.get(status, "Needs an extra that is not installed")
        # probes answer 503 with a status instead of an error
        found[str(status)] = {"description": about} | (
            {} if status == 503 else {"content": content}
        )
    return found


def _schemas(column: str) -> dict[str, Any]:
    cell = {"type": "string"}
    record = {"type": "object", "properties": {column: cell}, "required": [column]}
    rows = {"oneOf": [cell, _rows(cell), _rows(record), record | {"properties": {column: {}}}]}
    table = {
        "type": "object",
        "properties": {"columns": _rows(cell), "data": _rows(_rows({}))},
        "required": ["columns", "data"],
    }
    forms: Mapping[str, Any] = {
        "inputs": rows,
        "instances": rows,
        "dataframe_split": table,
        "dataframe_records": _rows(record),
    }
    top_k = {"type": "integer", "minimum": 1}
    params = {"type": "object", "properties": {"top_k": top_k, "explain": {"type": "boolean"}}}
    label = {
        "type": "object",
        "properties": {
            "label": cell,
            "score": {"type": "number", "minimum": 0, "maximum": 1},
            "explanation": _reference("Explanation"),
        },
        "required": ["label", "score"],
    }
    return {
        "Request": {
            "oneOf": [
                {
                    "type": "object",
                    "properties": {name: form, "params": {"oneOf": [params, {"type": "null"}]}},
                    "required": [name],
                }
                for name, form in forms.items()
            ]
        },
        "Predictions": {
            "type": "object",
            "properties": {"predictions": _rows({"oneOf": [label, _rows(label)]})},
            "required": ["predictions"],
        },
        "Explanation": _explanation(),
        "Error": {
            "type": "object",
            "properties": {"error_code": cell, "message": cell},
            "required": ["error_code", "message"],
        },
    }


def _explanation() -> dict[str, Any]:
    number, position = {"type": "number"}, {"type": "integer", "minimum": 0}
    contribution = {"start": position, "end": position, "value": number}
    properties: dict[str, Any] = {
        "method": {"type": "string"},
        "label": {"type": "string"},
        "logit": number,
        "base": number,
        "delta": number,
        "truncated": {"type": "boolean"},
        "contributions": _rows(
            {"type": "object", "properties": contribution, "required": list(contribution)}
        ),
    }
    return {"type": "object", "properties": properties, "required": list(properties)}


def _rows(of: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": of}


def _tensor_schemas() -> dict[str, Any]:
    """Bodies of the Open Inference Protocol."""
    text, size = {"type": "string"}, {"type": "integer", "minimum": 0}
    any_object = {"type": "object"}
    tensor = {
        "type": "object",
        "properties": {"name": text, "shape": _rows(size), "datatype": text, "data": _rows({})},
        "required": ["name", "shape", "datatype"],
    }
    output = {"type": "object", "properties": {"name": text}, "required": ["name"]}
    return {
        "InferenceRequest": {
            "type": "object",
            "properties": {
                "id": text,
                "inputs": _rows(tensor),
                "outputs": _rows(output),
                "parameters": any_object,
            },
            "required": ["inputs"],
        },
        "InferenceResponse": {
            "type": "object",
            "properties": {
                "id": text,
                "model_name": text,
                "model_version": text,
                "outputs": _rows(tensor),
            },
            "required": ["model_name", "model_version", "outputs"],
        },
        "InferenceError": {
            "type": "object",
            "properties": {"error": text},
            "required": ["error"],
        },
    }


def _feedback_schemas() -> dict[str, Any]:
    """Bodies of ``/feedback``."""
    text, whole = {"type": "string"}, {"type": "integer", "minimum": 0}
    item = {
        "type": "object",
        "properties": {"request_id": text, "row": whole, "label": text},
        "required": ["request_id", "label"],
        "additionalProperties": False,
    }
    fault = {"type": "object", "properties": {"index": whole, "status": whole, "message": text}}
    return {
        "Feedback": {
            "type": "object",
            "properties": {"feedback": _rows(item) | {"minItems": 1}},
            "required": ["feedback"],
            "additionalProperties": False,
        },
        "FeedbackResult": {
            "type": "object",
            "properties": {"taken": whole, "not_taken": _rows(fault)},
            "required": ["taken", "not_taken"],
        },
    }


def _reference(schema: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{schema}"}
