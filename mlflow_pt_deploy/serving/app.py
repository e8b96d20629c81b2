"""The small server behind ``pt-deploy serve``: MLflow's protocol, faster and tidier.

MLflow answers ``/ping``, ``/health`` and ``/version`` and parses the tables; ``/invocations`` goes
past its middleware straight to the model (2.3 times the requests per second for a model that
takes no time), and errors are written here, so that none carries a traceback or the caller's data.

Knows nothing of registries and aliases: it serves what it was given.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from io import BytesIO, StringIO
from typing import TYPE_CHECKING, Any

import uvicorn

from mlflow_pt_deploy.errors import ModelError, OverloadedError, RequestError
from mlflow_pt_deploy.serving.pyfunc import ScoringError, scoring_error

if TYPE_CHECKING:
    from mlflow.pyfunc import PyFuncModel

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

MAX_BODY_BYTES = 4 * 2**20
# A request holds a thread while it waits for its batch; asyncio's own pool (cores + 4) would keep
# batches small. More requests than threads are refused, so that none waits outside the deadline.
THREADS = 256
_JSON, _CSV, _PARQUET = "application/json", "text/csv", "application/vnd.apache.parquet"
_LISTS = ("inputs", "instances")
_FORMATS = (*_LISTS, "dataframe_split", "dataframe_records")


class App:
    """The ASGI application for one model.

    Args:
        model: A pyfunc of the `pt_deploy` flavor.
        max_body_bytes: Longest request body.

    Raises:
        ModelError: The model is of another flavor.
    """

    def __init__(self, model: PyFuncModel, *, max_body_bytes: int = MAX_BODY_BYTES) -> None:
        from mlflow.pyfunc import scoring_server

        self.model = model
        self.about = _about(model)
        self.max_body_bytes = max_body_bytes
        self._mlflow = scoring_server.init(model)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="score")
        self._in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        route = (scope.get("method"), scope["path"]) if scope["type"] == "http" else None
        if route == ("POST", "/invocations"):
            await self._invoke(scope, receive, send)
        elif route in (("GET", "/livez"), ("GET", "/readyz")):
            await _respond(send, 200, b"{}")
        elif route == ("GET", "/model"):
            await _respond(send, 200, json.dumps(self.about).encode())
        else:
            await self._mlflow(scope, receive, send)

    async def _invoke(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.lower(): value.decode("latin1") for name, value in scope["headers"]}
        body = await _read(receive, headers.get(b"content-length"), self.max_body_bytes)
        if body is None:
            message = f"the body is longer than {self.max_body_bytes} bytes; send fewer rows"
            error = {"error_code": "INVALID_PARAMETER_VALUE", "message": message}
            await _respond(send, 413, json.dumps(error).encode(), (b"connection", b"close"))
            return
        status, answer = await self._score(body, headers.get(b"content-type", ""))
        later = [(b"retry-after", b"1")] if status == 429 else []
        await _respond(send, status, answer, *later)

    async def _score(self, body: bytes, content_type: str) -> tuple[int, bytes]:
        try:
            if self._in_flight >= THREADS:
                raise OverloadedError(f"{THREADS} requests are waiting already. Try again later.")
            self._in_flight += 1
            try:
                loop = asyncio.get_running_loop()
                work = partial(score, self.model, body, content_type)
                return 200, await loop.run_in_executor(self._threads, work)
            finally:
                self._in_flight -= 1
        except _UnsupportedMediaError as error:
            return 415, scoring_error(error).serialize_as_json().encode()
        except Exception as error:
            failure = scoring_error(error)
            return failure.status, failure.serialize_as_json().encode()


class _UnsupportedMediaError(RequestError):
    """The body is of a type that MLflow's protocol does not know."""


def serve(
    model_uri: str,
    *,
    host: str = "127.0.0.1",
    port: int = 5000,
    model_config: Mapping[str, Any] | None = None,
) -> None:
    """Load a model and serve it until told to stop.

    Args:
        model_uri: Anything that MLflow loads: ``models:/NAME@champion``, a run's model, a folder.
        host: Address to listen on; only this machine by default.
        port: TCP port; 0 takes a free one.
        model_config: Serving options, see `mlflow_pt_deploy.serving.pyfunc.MODEL_CONFIG`.

    Raises:
        MlflowException: The model cannot be loaded.
        ModelError: The model is of another flavor.
    """
    import mlflow

    config = dict(model_config) if model_config else None
    app = App(mlflow.pyfunc.load_model(model_uri, model_config=config))
    settings = uvicorn.Config(
        app, host=host, port=port, access_log=False, log_level="warning", server_header=False
    )
    _Server(settings, app.about["name"]).run()


class _Server(uvicorn.Server):
    """Says where it listens, once it does."""

    def __init__(self, config: uvicorn.Config, name: str) -> None:
        super().__init__(config)
        self._name = name

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.started:
            return
        port = self.servers[0].sockets[0].getsockname()[1]
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        url = f"http://{host}:{port}"
        example = """-H 'Content-Type: application/json' -d '{"inputs": ["some text"]}'"""
        print(f"{self._name} on {url}   try: curl {url}/invocations {example}", flush=True)


def score(model: PyFuncModel, body: bytes, content_type: str) -> bytes:
    """Answer one body of MLflow's protocol, as JSON.

    Raises:
        RequestError: The body cannot be read; names the field.
        MlflowException: The model refused or failed, see `PyFunc.predict`.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.pyfunc.scoring_server import predictions_to_json

    data, params = _parse(model, body, content_type)
    try:
        predictions = model.predict(data, params=params)
    except ScoringError:
        raise
    except MlflowException as error:  # MLflow's own check, whose message repeats the data
        known = model.metadata.signature
        raise RequestError(
            "'params' or the input columns do not fit the model's signature, which is "
            f"inputs: {known.inputs or 'any'}, params: {known.params}"
        ) from error
    answer = StringIO()
    predictions_to_json(predictions, answer)
    return answer.getvalue().encode()


def _parse(model: PyFuncModel, body: bytes, content_type: str) -> tuple[Any, Any]:
    """Data and params of a body."""
    from mlflow.pyfunc import scoring_server

    media, _, rest = (part.strip().lower() for part in content_type.partition(";"))
    charset = rest.removeprefix("charset=").strip('"') or "utf-8"
    if media not in (_JSON, _CSV, _PARQUET) or charset not in ("utf-8", "utf8"):
        raise _UnsupportedMediaError(
            f"'Content-Type' must be {_JSON}, {_CSV} or {_PARQUET}, and the text UTF-8"
        )
    schema = model.metadata.signature and model.metadata.signature.inputs
    if media == _JSON:
        return _parse_json(body, schema)
    try:
        if media == _PARQUET:
            return scoring_server.parse_parquet_input(BytesIO(body)), None
        return scoring_server.parse_csv_input(StringIO(body.decode()), schema), None
    except Exception as error:
        raise RequestError(f"the body cannot be read as {media}") from error


def _parse_json(body: bytes, schema: Any) -> tuple[Any, Any]:
    from mlflow.pyfunc.scoring_server import infer_and_parse_data

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
    if given[0] in _LISTS and schema is None:
        # MLflow would make a NumPy array of it, as wide in every row as the longest text: a few
        # megabytes of JSON become gigabytes.
        return request[given[0]], params
    try:
        return infer_and_parse_data({given[0]: request[given[0]]}, schema), params
    except Exception as error:
        raise RequestError(f"'{given[0]}' is not in MLflow's format of that name") from error


def _about(model: PyFuncModel) -> dict[str, str]:
    """What ``/model`` answers."""
    try:
        manifest = model.get_raw_model().manifest
    except (NotImplementedError, AttributeError) as error:
        raise ModelError(
            "this model is not of the pt_deploy flavor. Serve it with mlflow models serve, or "
            "build one with pt-deploy optimize."
        ) from error
    about = {key: getattr(manifest, key) for key in ("name", "digest", "runtime", "precision")}
    return about | {"since": datetime.now(UTC).isoformat(timespec="seconds")}


async def _read(receive: Receive, length: str | None, limit: int) -> bytes | None:
    """The whole body, or None where it is longer than `limit` bytes."""
    if length and length.isdecimal() and int(length) > limit:
        return None
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > limit:
            return None
        if not message.get("more_body"):
            return bytes(body)


async def _respond(send: Send, status: int, body: bytes, *more: tuple[bytes, bytes]) -> None:
    length = (b"content-length", str(len(body)).encode())
    headers = [(b"content-type", b"application/json"), length, *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
