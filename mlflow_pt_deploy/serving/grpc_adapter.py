"""gRPC adapter of `Application`: the service of the Open Inference Protocol (V2).

Specification: https://github.com/kserve/open-inference-protocol. A call becomes the request to the
REST path of the same meaning, and its response a message. So authorization, admission, deadlines,
metrics and the access log are those of HTTP.
"""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc

from mlflow_pt_deploy.errors import RequestError
from mlflow_pt_deploy.serving.http import open_inference_pb2 as messages
from mlflow_pt_deploy.serving.http.deadline import DEADLINE_HEADER
from mlflow_pt_deploy.serving.http.open_inference import JSON_LENGTH_HEADER, MODELS, ROOT
from mlflow_pt_deploy.serving.http.request import Request
from mlflow_pt_deploy.serving.http.response import Response
from mlflow_pt_deploy.serving.http.scoring_format import MAX_INLINE_BYTES
from mlflow_pt_deploy.serving.rollout.canary.split import KEY_HEADER

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

_HEADERS = ("authorization", "x-request-id", "traceparent", DEADLINE_HEADER, KEY_HEADER)
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
    """A request without a body; `lost` is set when the client cancels its call."""

    length = 0

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}
        self.lost = asyncio.Event()

    async def read(self) -> bytes:
        return b""

    async def chunks(self) -> AsyncIterator[bytes]:
        yield await self.read()

    async def disconnected(self) -> None:
        await self.lost.wait()


class _InferBody(_Body):
    """A message as the body of the REST request. It is converted when it is read: once the request
    is admitted, and on a thread if that takes long."""

    def __init__(self, message: Any, threads: Executor) -> None:
        super().__init__()
        self._message = message
        self._threads = threads
        self.length = message.ByteSize()

    async def read(self) -> bytes:
        if self.length > MAX_INLINE_BYTES:
            loop = asyncio.get_running_loop()
            found = await loop.run_in_executor(self._threads, _to_rest, self._message)
        else:
            found = _to_rest(self._message)
        head, binary = found
        self.headers[JSON_LENGTH_HEADER] = str(len(head))
        return head + binary


class GrpcAdapter:
    """The methods of the service.

    Args:
        application: Answers the requests.
    """

    def __init__(self, application: Application) -> None:
        self._application = application
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="grpc")

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
        found = await self._answer("POST", path, context, _InferBody(request, self._threads))
        return _to_message(json.loads(found.body))

    async def _probe(self, path: str, context: Any) -> bool:
        found = await self._respond("GET", path, context)
        if found.status == 404:
            await _abort(context, found)
        return found.status == 200

    async def _answer(
        self, method: str, path: str, context: Any, body: _Body | None = None
    ) -> Response:
        """The response to a request; ends the call if it is an error."""
        found = await self._respond(method, path, context, body)
        if found.status != 200:
            await _abort(context, found)
        context.set_trailing_metadata(found.headers)
        return found

    async def _respond(
        self, method: str, path: str, context: Any, body: _Body | None = None
    ) -> Response:
        body = body or _Body()
        body.headers |= {k: value for k, value in context.invocation_metadata() if k in _HEADERS}
        body.headers["content-length"] = str(body.length)
        remaining_s = context.time_remaining()
        if remaining_s is not None:
            body.headers.setdefault(DEADLINE_HEADER, str(max(0, int(remaining_s * 1000))))
        request = Request(method, path, body.headers, body)
        task = asyncio.ensure_future(self._application.respond(request))
        try:
            return await asyncio.shield(task)  # it counts the request also if it is cancelled
        except asyncio.CancelledError:
            body.lost.set()
            raise


async def _abort(context: Any, found: Response) -> None:
    """End a call with the error of a response."""
    code = _STATUSES.get(found.status, grpc.StatusCode.INTERNAL)
    await context.abort(code, json.loads(found.body)["error"], found.headers)


def _path(name: str, version: str) -> str:
    """The REST path of a model; no name or version has a slash, so such a path is unknown."""
    name, version = name.replace("/", "%2F"), version.replace("/", "%2F")
    return f"{MODELS}{name}/versions/{version}" if version else f"{MODELS}{name}"


def _to_rest(message: Any) -> tuple[bytes, bytes]:
    """JSON and binary data of the REST request with the same content.

    Raises:
        RequestError: There is not one tensor, or not one content.
    """
    if len(message.inputs) != 1:
        raise RequestError(f"there are {len(message.inputs)} input tensors; the model reads one")
    (tensor,) = message.inputs
    raw = message.raw_input_contents
    if len(raw) > 1 or (raw and tensor.HasField("contents")):
        raise RequestError(
            "the tensor needs its data once, in 'contents.bytes_contents' or in "
            "'raw_input_contents'"
        )
    binary = raw[0] if raw else _packed(tensor.contents.bytes_contents)
    content: dict[str, Any] = {
        "inputs": [
            {
                "name": tensor.name,
                "datatype": tensor.datatype,
                "shape": list(tensor.shape),
                "parameters": {"binary_data_size": len(binary)},
            }
        ],
        "outputs": [{"name": each.name} for each in message.outputs],
        "parameters": {name: _value(each) for name, each in message.parameters.items()},
    }
    if message.id:
        content["id"] = message.id
    return json.dumps(content).encode(), binary


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
