"""gRPC adapter of `Application`: the service of the Open Inference Protocol (V2).

Specification: https://github.com/kserve/open-inference-protocol. A call becomes the request to the
REST path of the same meaning, and its response a message. So authorization, admission, deadlines,
metrics and the access log are those of HTTP.
"""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import grpc

from mlflow_pt_deploy.serving.http import open_inference_pb2 as messages
from mlflow_pt_deploy.serving.http.deadline import DEADLINE_HEADER
from mlflow_pt_deploy.serving.http.open_inference import JSON_LENGTH_HEADER, MODELS, ROOT
from mlflow_pt_deploy.serving.http.request import Request
from mlflow_pt_deploy.serving.http.response import Response

if TYPE_CHECKING:
    from mlflow_pt_deploy.serving.app import Application

SERVICE = "inference.GRPCInferenceService"

_METHODS = (
    "ServerLive",
    "ServerReady",
    "ModelReady",
    "ServerMetadata",
    "ModelMetadata",
    "ModelInfer",
)
_POLL_S = 0.1

_HEADERS = ("authorization", "x-request-id", "traceparent", DEADLINE_HEADER)
_STATUSES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    499: grpc.StatusCode.CANCELLED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}


class _Body:
    """A request body that is in memory; `lost` is set when the client cancels its call."""

    __slots__ = ("_content", "lost")

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.lost = asyncio.Event()

    async def read(self) -> bytes:
        return self._content

    async def chunks(self) -> AsyncIterator[bytes]:
        yield self._content

    async def disconnected(self) -> None:
        await self.lost.wait()


class GrpcAdapter:
    """The methods of the service.

    Args:
        application: Answers the requests.
    """

    def __init__(self, application: Application) -> None:
        self._application = application

    def handler(self) -> Any:
        """The service, for `grpc.aio.Server.add_generic_rpc_handlers`."""
        methods = {
            name: grpc.unary_unary_rpc_method_handler(
                getattr(self, name),
                getattr(messages, f"{name}Request").FromString,
                getattr(messages, f"{name}Response").SerializeToString,
            )
            for name in _METHODS
        }
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    async def ServerLive(self, request: Any, context: Any) -> Any:
        """Whether the process answers and no model hangs."""
        live = await self._probe(f"{ROOT}/health/live", context)
        return messages.ServerLiveResponse(live=live)

    async def ServerReady(self, request: Any, context: Any) -> Any:
        """Whether all models are ready; false while the server drains."""
        ready = await self._probe(f"{ROOT}/health/ready", context)
        return messages.ServerReadyResponse(ready=ready)

    async def ModelReady(self, request: Any, context: Any) -> Any:
        """Whether a model is ready."""
        path = f"{_path(request.name, request.version)}/ready"
        return messages.ModelReadyResponse(ready=await self._probe(path, context))

    async def ServerMetadata(self, request: Any, context: Any) -> Any:
        """Name and version of the server."""
        found = await self._answer("GET", ROOT, context)
        return messages.ServerMetadataResponse(**json.loads(found.body))

    async def ModelMetadata(self, request: Any, context: Any) -> Any:
        """Tensors of a model."""
        found = await self._answer("GET", _path(request.name, request.version), context)
        return messages.ModelMetadataResponse(**json.loads(found.body))

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        """Score the rows of a tensor."""
        path = f"{_path(request.model_name, request.model_version)}/infer"
        head, binary = _to_rest(request)
        more = {JSON_LENGTH_HEADER: str(len(head))}
        found = await self._answer("POST", path, context, head + binary, more)
        return _to_message(json.loads(found.body))

    async def _probe(self, path: str, context: Any) -> bool:
        found = await self._respond("GET", path, context)
        if found.status == 404:
            await _abort(context, found)
        return found.status == 200

    async def _answer(
        self,
        method: str,
        path: str,
        context: Any,
        body: bytes = b"",
        more: Mapping[str, str] | None = None,
    ) -> Response:
        """The response to a request; ends the call if it is an error."""
        found = await self._respond(method, path, context, body, more)
        if found.status != 200:
            await _abort(context, found)
        context.set_trailing_metadata(found.headers)
        return found

    async def _respond(
        self,
        method: str,
        path: str,
        context: Any,
        body: bytes = b"",
        more: Mapping[str, str] | None = None,
    ) -> Response:
        given = {name: value for name, value in context.invocation_metadata() if name in _HEADERS}
        headers = {"content-length": str(len(body)), **given, **(more or {})}
        remaining_s = context.time_remaining()
        if remaining_s is not None:
            headers.setdefault(DEADLINE_HEADER, str(max(0, int(remaining_s * 1000))))
        content = _Body(body)
        request = Request(method, path, headers, content)
        task = asyncio.ensure_future(self._application.respond(request))
        try:
            return await asyncio.shield(task)  # it counts the request also if it is cancelled
        except asyncio.CancelledError:
            content.lost.set()
            raise


class GrpcServer:
    """Serves an `Application` over gRPC on the event loop of a worker.

    Args:
        application: Answers the requests.
        address: Host and port.
        tls: PEM private key and certificate chain, or None.
        max_body_bytes: Longest message.
        max_calls: Most concurrent calls.
        idle_s: Seconds after which an idle connection is closed.
        grace_s: Seconds that calls in flight have to finish.
        stopping: Whether the server is shutting down.
        on_failed: Called if the port cannot be listened on.

    Attributes:
        listening: Whether calls are accepted.
    """

    def __init__(
        self,
        application: Application,
        address: str,
        *,
        tls: tuple[bytes, bytes] | None,
        max_body_bytes: int,
        max_calls: int,
        idle_s: float,
        grace_s: float,
        stopping: Callable[[], bool],
        on_failed: Callable[[Exception], None],
    ) -> None:
        self._application = application
        self._address = address
        self._tls = tls
        self._max_calls = max_calls
        self._grace_s = grace_s
        self._stopping = stopping
        self._on_failed = on_failed
        self._options = [
            ("grpc.so_reuseport", 1),
            ("grpc.max_receive_message_length", max_body_bytes),
            ("grpc.max_connection_idle_ms", round(max(1.0, idle_s) * 1000)),
        ]
        self._closing = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self.listening = False

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Listen as soon as the event loop runs."""
        self._loop, self._task = loop, loop.create_task(self._serve())

    def close(self) -> None:
        """Wait for calls in flight, if the event loop has ended before them."""
        self._closing = True
        if self._loop is not None and self._task is not None and not self._loop.is_running():
            self._loop.run_until_complete(self._task)

    async def _serve(self) -> None:
        server = grpc.aio.server(options=self._options, maximum_concurrent_rpcs=self._max_calls)
        server.add_generic_rpc_handlers((GrpcAdapter(self._application).handler(),))
        try:
            if self._tls is None:
                server.add_insecure_port(self._address)
            else:
                server.add_secure_port(self._address, grpc.ssl_server_credentials([self._tls]))
            await server.start()
        except RuntimeError as error:
            self._on_failed(error)
            return
        self.listening = True
        while not (self._closing or self._stopping()):
            await asyncio.sleep(_POLL_S)
        self.listening = False
        await server.stop(self._grace_s)


async def _abort(context: Any, found: Response) -> None:
    """End a call with the error of a response."""
    code = _STATUSES.get(found.status, grpc.StatusCode.INTERNAL)
    await context.abort(code, json.loads(found.body)["error"], found.headers)


def _path(name: str, version: str) -> str:
    """The REST path of a model; no name or version has a slash, so such a path is unknown."""
    name, version = name.replace("/", "%2F"), version.replace("/", "%2F")
    return f"{MODELS}{name}/versions/{version}" if version else f"{MODELS}{name}"


def _to_rest(request: Any) -> tuple[bytes, bytes]:
    """JSON and binary data of the REST request with the same content."""
    raw: Sequence[bytes] = request.raw_input_contents or [
        _packed(tensor.contents.bytes_contents) for tensor in request.inputs
    ]
    tensors = [
        {"name": each.name, "datatype": each.datatype, "shape": list(each.shape)}
        for each in request.inputs
    ]
    if len(raw) == len(tensors):
        for tensor, data in zip(tensors, raw, strict=True):
            tensor["parameters"] = {"binary_data_size": len(data)}
    else:
        raw = ()  # without data the tensor is rejected
    parameters = {name: _value(each) for name, each in request.parameters.items()}
    content: dict[str, Any] = {
        "inputs": tensors,
        "outputs": [{"name": each.name} for each in request.outputs],
        "parameters": parameters,
    }
    if request.id:
        content["id"] = request.id
    return json.dumps(content).encode(), b"".join(raw)


def _value(parameter: Any) -> Any:
    kind = parameter.WhichOneof("parameter_choice")
    return getattr(parameter, kind) if kind else None


def _packed(elements: Sequence[bytes]) -> bytes:
    """Elements, each after its length in four bytes, little-endian."""
    return b"".join(len(each).to_bytes(4, "little") + each for each in elements)


def _to_message(response: Mapping[str, Any]) -> Any:
    """The message with the content of a REST response; clients expect raw outputs."""
    found = messages.ModelInferResponse(
        model_name=response["model_name"],
        model_version=response["model_version"],
        id=response.get("id", ""),
    )
    for each in response["outputs"]:
        found.outputs.add(name=each["name"], datatype=each["datatype"], shape=each["shape"])
        data = each["data"]
        if each["datatype"] == "BYTES":
            raw = _packed([text.encode() for text in data])
        else:
            raw = struct.pack(f"<{len(data)}d", *data)
        found.raw_output_contents.append(raw)
    return found
