"""HTTP client for running deployments: scoring, model status, waiting for a hot swap."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterable, Mapping
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import (
    INVALID_PARAMETER_VALUE,
    RESOURCE_DOES_NOT_EXIST,
    ErrorCode,
)

from mlflow_pt_deploy.data.columns import INPUTS, find_pair_columns
from mlflow_pt_deploy.plugins.local_servers import State
from mlflow_pt_deploy.registry.addresses import ModelSpec
from mlflow_pt_deploy.serving.http.auth import auth_from_environment, bearer

_FORMATS = {"inputs", "instances", "dataframe_split", "dataframe_records"}


def score(state: State, inputs: Any) -> dict[str, Any]:
    """Score rows: a text, a DataFrame, an array, a list, or a whole request as a dict.

    Raises:
        MlflowException: The server does not answer, or rejected the rows.
    """
    return _request(state, "POST", "/invocations", auth_from_environment().scoring, _body(inputs))


def model_status(state: State) -> dict[str, Any]:
    """Get ``/model``, the status of the served model.

    Raises:
        MlflowException: The server does not answer, or rejected the token.
    """
    auth = auth_from_environment()
    return _request(state, "GET", "/model", auth.admin or auth.scoring)


def await_swap(state: State, target: ModelSpec, ready_s: float) -> None:
    """Wait until all replicas serve `target`.

    Raises:
        MlflowException: A replica rejected it or cannot find it, or `ready_s` seconds passed.
    """
    wanted = {"uri": target.uri, "model_config": dict(target.model_config)}
    end = time.monotonic() + ready_s
    polls = {status["replica"]: status["looks"] for status in _replicas(state)}
    while time.monotonic() < end:
        done = True
        for status in _replicas(state):
            rejected = status["refused"] or {}
            polled = status["looks"] > polls.setdefault(status["replica"], status["looks"]) + 1
            if polled and status["registry_lost_since"]:
                raise MlflowException(
                    f"{state.name} was not updated: {target.uri} cannot be found in the registry",
                    RESOURCE_DOES_NOT_EXIST,
                )
            if {key: rejected.get(key) for key in wanted} == wanted:
                raise MlflowException(f"{state.name} was not updated: {rejected['reason']}")
            done &= {key: status.get(key) for key in wanted} == wanted and not rejected
        if done:
            return
        time.sleep(0.1)
    raise MlflowException(f"{state.name} was not updated within {ready_s:g} s (ready_s)")


def _replicas(state: State) -> list[dict[str, Any]]:
    """Status of each replica; a restarting one has none, and will start with the new target."""
    return [each for each in model_status(state)["replicas"] if "looks" in each]


def _request(
    state: State, method: str, path: str, tokens: tuple[bytes, ...], body: Any = None
) -> dict[str, Any]:
    import requests

    headers = bearer(tokens)
    try:
        data = None if body is None else json.dumps(body, default=_text)
        headers |= {"Content-Type": "application/json"} if data else {}
        answer = requests.request(method, state.url + path, data=data, headers=headers, timeout=60)
        content: dict[str, Any] = answer.json()
    except requests.RequestException as error:
        raise MlflowException(
            f"{state.name} does not answer at {state.url}. Restart it with mlflow deployments "
            "update, or delete it."
        ) from error
    if answer.status_code != 200:
        code = content.get("error_code", "")
        known = code if code in ErrorCode.keys() else "INTERNAL_ERROR"  # noqa: SIM118  # protobuf
        raise MlflowException(content.get("message", "request rejected"), ErrorCode.Value(known))
    return content


def _text(value: Any) -> str:
    """Encode the bytes of an image file in base64, as MLflow's protocol does."""
    if isinstance(value, bytes | bytearray | memoryview):
        return base64.b64encode(value).decode()
    raise MlflowException(f"a {type(value).__name__} cannot be sent", INVALID_PARAMETER_VALUE)


def _body(inputs: Any) -> Any:
    """Convert inputs of a model's `predict` to a request body of MLflow's protocol.

    Of a table only the input column is sent; other columns may hold values that JSON has not.
    """
    if inputs is None:
        raise MlflowException(
            "inputs is None; give a text, a list of texts, a DataFrame with the column `text` (or "
            "`image`), or a whole request as a dict",
            INVALID_PARAMETER_VALUE,
        )
    if isinstance(inputs, Mapping):
        return inputs if _FORMATS & inputs.keys() else {"inputs": _plain(inputs)}
    if hasattr(inputs, "to_pandas"):  # Arrow, polars, datasets
        inputs = inputs.to_pandas()
    if hasattr(inputs, "columns"):
        known = [name for name in inputs.columns if name in INPUTS]
        if known and not find_pair_columns(inputs.columns)[1]:
            inputs = inputs[known]
        split = inputs.to_dict("split")
        return {"dataframe_split": {key: split[key] for key in ("columns", "data")}}
    return {"inputs": _plain(inputs)}


def _plain(inputs: Any) -> Any:
    """Convert rows to JSON types; a text or a file is one row, any other iterable is several.

    Cells are not checked: the server reports the invalid ones.
    """
    if isinstance(inputs, str | bytes | bytearray | memoryview):
        return inputs
    if isinstance(inputs, Mapping):
        return {key: _plain(value) for key, value in inputs.items()}
    if hasattr(inputs, "tolist"):
        return inputs.tolist()
    return [*inputs] if isinstance(inputs, Iterable) else inputs
