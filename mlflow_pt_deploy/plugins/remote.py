"""What a running deployment is asked over HTTP, with our token where it wants one."""

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

from mlflow_pt_deploy.columns import INPUTS, paired
from mlflow_pt_deploy.plugins.servers import State
from mlflow_pt_deploy.serving.guard import guard_from_environment
from mlflow_pt_deploy.serving.registry import Target

_FORMATS = {"inputs", "instances", "dataframe_split", "dataframe_records"}


def score(state: State, inputs: Any) -> dict[str, Any]:
    """Score rows: a text, a DataFrame, an array, a list, or a whole request as a dict.

    Raises:
        MlflowException: The server does not answer, or refused the rows.
    """
    return _ask(state, "POST", "/invocations", guard_from_environment().scoring, _body(inputs))


def about(state: State) -> dict[str, Any]:
    """What the server says of its model.

    Raises:
        MlflowException: The server does not answer, or refused our token.
    """
    guard = guard_from_environment()
    return _ask(state, "GET", "/model", guard.admin or guard.scoring)


def await_swap(state: State, target: Target, ready_s: float) -> None:
    """Wait until the server serves `target`, with all its replicas.

    Raises:
        MlflowException: It refused it, cannot find it, or was not done within `ready_s` seconds.
    """
    wanted = {"uri": target.uri, "model_config": dict(target.model_config)}
    end = time.monotonic() + ready_s
    looks = {told["replica"]: told["looks"] for told in _replicas(state)}
    while time.monotonic() < end:
        done = True
        for told in _replicas(state):
            refused = told["refused"] or {}
            seen = told["looks"] > looks.setdefault(told["replica"], told["looks"]) + 1
            if seen and told["registry_lost_since"]:
                raise MlflowException(
                    f"{state.name} was not updated: {target.uri} cannot be found in the registry",
                    RESOURCE_DOES_NOT_EXIST,
                )
            if {key: refused.get(key) for key in wanted} == wanted:
                raise MlflowException(f"{state.name} was not updated: {refused['reason']}")
            done &= {key: told.get(key) for key in wanted} == wanted and not refused
        if done:
            return
        time.sleep(0.1)
    raise MlflowException(f"{state.name} was not updated within {ready_s:g} s (ready_s)")


def _replicas(state: State) -> list[dict[str, Any]]:
    """What each replica says of itself; one that is being started again will read the target."""
    told = about(state)
    replicas = told.get("replicas") or [{**told, "replica": 0, "answers": True}]
    return [each for each in replicas if each["answers"]]


def _ask(
    state: State, method: str, path: str, tokens: tuple[bytes, ...], body: Any = None
) -> dict[str, Any]:
    import requests

    headers = {"Authorization": f"Bearer {tokens[0].decode()}"} if tokens else {}
    try:
        data = None if body is None else json.dumps(body, default=_text)
        headers |= {"Content-Type": "application/json"} if data else {}
        answer = requests.request(method, state.url + path, data=data, headers=headers, timeout=60)
        content: dict[str, Any] = answer.json()
    except requests.RequestException as error:
        raise MlflowException(
            f"{state.name} does not answer at {state.url}. Start it again with mlflow deployments "
            "update, or delete it."
        ) from error
    if answer.status_code != 200:
        code = content.get("error_code", "")
        known = code if code in ErrorCode.keys() else "INTERNAL_ERROR"  # noqa: SIM118  # protobuf
        raise MlflowException(content.get("message", "refused"), ErrorCode.Value(known))
    return content


def _text(value: Any) -> str:
    """An image file's bytes as MLflow's protocol carries them."""
    if isinstance(value, bytes | bytearray | memoryview):
        return base64.b64encode(value).decode()
    raise MlflowException(f"a {type(value).__name__} cannot be sent", INVALID_PARAMETER_VALUE)


def _body(inputs: Any) -> Any:
    """A request's body: what a model's `predict` takes in Python, as MLflow's protocol carries it.

    Of a table only the column of inputs is sent: the others may hold what JSON cannot carry.
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
        if known and not paired(inputs.columns)[1]:
            inputs = inputs[known]
        split = inputs.to_dict("split")
        return {"dataframe_split": {key: split[key] for key in ("columns", "data")}}
    return {"inputs": _plain(inputs)}


def _plain(inputs: Any) -> Any:
    """Rows as JSON has them; a text or a file is one row, whatever else can be gone through many.

    Cells stay as they are: the server says which of them is not a row.
    """
    if isinstance(inputs, str | bytes | bytearray | memoryview):
        return inputs
    if isinstance(inputs, Mapping):
        return {key: _plain(value) for key, value in inputs.items()}
    if hasattr(inputs, "tolist"):
        return inputs.tolist()
    return [*inputs] if isinstance(inputs, Iterable) else inputs
