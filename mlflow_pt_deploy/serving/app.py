"""The application of ``pt-deploy serve``: routes, authorization, and the path of a request.

An adapter (`rsgi`, `asgi`) passes it a `Request` and sends the `Response`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from mlflow_pt_deploy.serving.batching.request import RequestContext
from mlflow_pt_deploy.serving.http.auth import TokenAuth
from mlflow_pt_deploy.serving.http.deadline import DEADLINE_HEADER, Deadline
from mlflow_pt_deploy.serving.http.mlflow_protocol import (
    PARQUET_READER,
    error_to_response,
    is_small,
    media_type,
    parse,
    parse_and_encode,
)
from mlflow_pt_deploy.serving.http.openapi import document
from mlflow_pt_deploy.serving.http.request import (
    BODY_TIMEOUT_S,
    MAX_BODY_BYTES,
    BodyTooLongError,
    DisconnectedError,
    Request,
)
from mlflow_pt_deploy.serving.http.request_id import RequestIds
from mlflow_pt_deploy.serving.http.response import (
    CLIENT_DISCONNECTED,
    RETRY_AFTER,
    Response,
    error_response,
    json_response,
)
from mlflow_pt_deploy.serving.lifecycle.served_model import ServedModel
from mlflow_pt_deploy.serving.model.loaded_model import LoadedModel
from mlflow_pt_deploy.serving.observability.access_log import AccessLog
from mlflow_pt_deploy.serving.observability.metrics import Metrics
from mlflow_pt_deploy.serving.observability.tracing import RequestTracer
from mlflow_pt_deploy.serving.worker_state import WorkerStates

Page = Callable[[], Response]

_PARSER_THREADS = 2
# A connection is watched for its end only while a response takes longer than this.
_WATCH_AFTER_S = 0.05


class Rejection(Exception):
    """A request is rejected before its body is parsed.

    Args:
        response: The response. The rest of the body is read and dropped before it is sent: a proxy
            such as nginx treats an earlier response as a failure of the server.
    """

    def __init__(self, response: Response) -> None:
        super().__init__(response.error_code)
        self.response = response


class Application:
    """Answers requests for one or more models.

    Args:
        models: Models by name; ``/invocations`` is served by the first.
        auth: Tokens for scoring and for the admin pages.
        metrics: Counts responses.
        access_log: Writes a line for each response, if given.
        tracer: Exports a span for each scoring request, if given.
        max_body_bytes: Longest request body.
        hang_s: Seconds after which a running batch makes ``/livez`` fail; 0: never.
        states: State of all workers of this server.
        on_start, on_stop: Called when the event loop starts and ends.

    Attributes:
        active: Requests that are being answered.
    """

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        *,
        auth: TokenAuth | None = None,
        metrics: Metrics | None = None,
        access_log: AccessLog | None = None,
        tracer: RequestTracer | None = None,
        max_body_bytes: int = MAX_BODY_BYTES,
        hang_s: float = 0.0,
        states: WorkerStates | None = None,
        on_start: Callable[[asyncio.AbstractEventLoop], None] = lambda loop: None,
        on_stop: Callable[[], None] = lambda: None,
    ) -> None:
        self._models = models
        self._auth = auth or TokenAuth()
        self._metrics = metrics or Metrics()
        self._access_log = access_log
        self._tracer = tracer
        self._max_body_bytes = max_body_bytes
        self._hang_s = hang_s
        self._states = states
        self._on_start, self._on_stop = on_start, on_stop
        self.active = 0
        self._request_ids = RequestIds()
        self._parsers = ThreadPoolExecutor(_PARSER_THREADS, thread_name_prefix="parse")
        self._in_flight = dict.fromkeys(models, 0)
        first = next(iter(models.values()))
        self._scoring = {f"/models/{name}/invocations": model for name, model in models.items()}
        self._scoring["/invocations"] = first
        self._probes: dict[str, Page] = {
            "/ping": self._ping,
            "/health": self._ping,
            "/version": _mlflow_version,
            "/livez": self._livez,
            "/readyz": self._readyz,
            "/openapi.json": self._openapi,
        }
        self._admin: dict[str, Page] = {
            "/metrics": self._exposition,
            "/model": partial(self._status, first.name),
            "/models": self._all_status,
            **{f"/models/{name}": partial(self._status, name) for name in models},
        }
        for name, model in models.items():
            self._metrics.gauge("queue_rows", name, partial(_queued_rows, model))
            self._metrics.gauge("in_flight", name, partial(self._in_flight.__getitem__, name))
            self._metrics.gauge("loaded", name, partial(_is_loaded, model))

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Prepare for requests on an event loop."""
        self._on_start(loop)

    def stop(self) -> None:
        """Release threads and connections; the event loop has ended."""
        self._on_stop()
        self._parsers.shutdown(wait=False, cancel_futures=True)
        PARQUET_READER.close()
        if self._tracer is not None:
            self._tracer.close()

    async def respond(self, request: Request) -> Response:
        """Answer one request; raises nothing."""
        model = self._scoring.get(request.path)
        self.active += 1
        try:
            if model is None or request.method != "POST":
                response = await self._read_only(request)
            else:
                response = await self._score(model, request)
        except Rejection as rejection:
            await request.discard()
            response = rejection.response
        finally:
            self.active -= 1
        request_id = self._request_ids.of(request.headers)
        self._record(model, request, response, request_id)
        headers = (("x-request-id", request_id), *response.headers)
        if response.model_version:
            headers = (("x-model-version", response.model_version), *headers)
        return response._replace(headers=headers)

    async def _score(self, model: ServedModel, request: Request) -> Response:
        """Score the rows of one request.

        Raises:
            Rejection: It is rejected before its body is parsed.
        """
        version, context = self._admit(model, request)
        self._in_flight[model.name] += 1
        try:
            return await self._predict(version, request, context)
        except Exception as error:
            return self._failure(error, version)
        finally:
            self._in_flight[model.name] -= 1

    def _admit(self, model: ServedModel, request: Request) -> tuple[LoadedModel, RequestContext]:
        """The version that answers this request, and its context with the deadline.

        Raises:
            Rejection: The token is wrong, no version is in memory, or the server is overloaded.
        """
        if not self._auth.can_score(request.headers.get("authorization")):
            raise Rejection(_unauthorized("a token"))
        version = model.acquire()
        if version is None:
            raise Rejection(_unavailable(model))
        service = version.pyfunc.service
        deadline = Deadline.from_header(
            request.headers.get(DEADLINE_HEADER), service.options.deadline_ms
        )
        in_flight = self._in_flight[model.name]
        if reason := service.rejection(deadline.remaining_s(), in_flight):
            overloaded = error_response(429, "RESOURCE_EXHAUSTED", reason, RETRY_AFTER)
            raise Rejection(overloaded._replace(model_version=version.label))
        return version, RequestContext(deadline.expires_at)

    def _failure(self, error: Exception, version: LoadedModel) -> Response:
        """The response to a request that failed while it was read or scored.

        Raises:
            Rejection: The body is too long; its rest is still to be read.
        """
        if isinstance(error, BodyTooLongError):
            message = f"the body is longer than {self._max_body_bytes} bytes; send fewer rows"
            raise Rejection(error_response(413, "INVALID_PARAMETER_VALUE", message))
        if isinstance(error, TimeoutError):
            message = f"the body did not arrive within {BODY_TIMEOUT_S:g} s"
            return error_response(408, "DEADLINE_EXCEEDED", message)
        if isinstance(error, DisconnectedError):
            return CLIENT_DISCONNECTED
        return error_to_response(error, version.label)

    async def _predict(
        self, version: LoadedModel, request: Request, context: RequestContext
    ) -> Response:
        service = version.pyfunc.service
        body = await request.read(self._max_body_bytes)
        media = media_type(request.headers)
        if is_small(service, body, media):
            found = parse(service, body, media)
        else:
            loop = asyncio.get_running_loop()
            work = partial(parse_and_encode, service, body, media)
            found = await loop.run_in_executor(self._parsers, work)
        predictions = service.submit(found.rows, found.top_k, context, found.encoded)
        if service.runs_inline:
            texts = await predictions
        else:
            texts = await self._watched(predictions, request, context)
        text = f'{{"predictions": [{", ".join(texts)}]}}'
        return Response(200, text.encode(), model_version=version.label)

    async def _watched(
        self, predictions: asyncio.Future[list[str]], request: Request, context: RequestContext
    ) -> list[str]:
        """Wait for predictions; rows of a client that disconnects are dropped from the queue."""
        await asyncio.wait([predictions], timeout=_WATCH_AFTER_S)
        if predictions.done():
            return predictions.result()
        watcher: asyncio.Future[Any] = asyncio.ensure_future(request.disconnected())
        try:
            waited: list[asyncio.Future[Any]] = [predictions, watcher]
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if not predictions.done():
                context.disconnected = True
                predictions.cancel()
                raise DisconnectedError
            return predictions.result()
        finally:
            watcher.cancel()

    async def _read_only(self, request: Request) -> Response:
        """Answer a request for a probe or an admin page.

        Raises:
            Rejection: There is no such page, its method is not allowed, or the token is wrong.
        """
        path = request.path
        page = self._probes.get(path) or self._admin.get(path)
        if page is None and path not in self._scoring:
            raise Rejection(error_response(404, "ENDPOINT_NOT_FOUND", "there is no such path"))
        if page is None or request.method not in ("GET", "HEAD"):
            allowed = "GET, HEAD" if page else "POST"
            message = f"this path takes {allowed}"
            raise Rejection(
                error_response(405, "INVALID_PARAMETER_VALUE", message, ("allow", allowed))
            )
        if path in self._probes:
            response = page()
        elif self._auth.can_read_admin(request.headers.get("authorization")):
            response = await asyncio.get_running_loop().run_in_executor(self._parsers, page)
        else:
            raise Rejection(_unauthorized("an admin token"))
        await request.discard()
        return response

    def _record(
        self, model: ServedModel | None, request: Request, response: Response, request_id: str
    ) -> None:
        """Count, log and trace a response."""
        seconds = time.perf_counter() - request.received_at
        path, label = request.path, response.model_version
        if model is not None:
            self._metrics.response_sent(model.name, label, response, seconds)
            if label and response.status == 200 and model.current is not None:
                model.current.seconds.append(seconds)
            if self._tracer is not None:
                parent = request.headers.get("traceparent") or ""
                self._tracer.response_sent(model.name, label, path, response, seconds, parent)
        if self._access_log is not None and path not in self._probes:
            route = path if model or path in self._admin else "-"
            self._access_log.write(route, response, seconds, request_id)

    @property
    def hangs(self) -> bool:
        """Whether a model has been computing one batch for longer than `hang_s`."""
        limit = self._hang_s
        return bool(limit) and any(each.running_s > limit for each in self._models.values())

    def _livez(self) -> Response:
        if self.hangs:
            return Response(503, b'{"status": "hangs"}', "TEMPORARILY_UNAVAILABLE")
        return Response(200, b"{}")

    def _readyz(self) -> Response:
        alive = self._livez()
        if alive.status != 200:
            return alive
        if self._states is not None and self._states.draining:
            return Response(503, b'{"status": "draining"}', "TEMPORARILY_UNAVAILABLE")
        own = all(model.current or model.unloaded for model in self._models.values())
        if own and (self._states is None or self._states.started()):
            return Response(200, b'{"status": "ready"}')
        return Response(503, b'{"status": "loading"}', "TEMPORARILY_UNAVAILABLE")

    def _ping(self) -> Response:
        return Response(self._readyz().status, b"\n")

    def _openapi(self) -> Response:
        current = next(iter(self._models.values())).current
        column = current.pyfunc.loaded.preprocessor.column if current else None
        return json_response(document(self._models, column))

    def _status(self, name: str) -> Response:
        status = self._models[name].status()
        if self._states is not None:
            status["replicas"] = self._states.of_model(name)
        return json_response(status)

    def _all_status(self) -> Response:
        return json_response([model.status() for model in self._models.values()])

    def _exposition(self) -> Response:
        text = self._metrics.expose()
        if text is None:
            message = "metrics need an extra: pip install 'mlflow-pt-deploy[serve]'"
            return error_response(501, "NOT_IMPLEMENTED", message)
        return Response(200, text, content_type=self._metrics.content_type)


def _unauthorized(token: str) -> Response:
    message = f"send {token}: Authorization: Bearer ..."
    return error_response(401, "UNAUTHENTICATED", message, ("www-authenticate", "Bearer"))


def _unavailable(model: ServedModel) -> Response:
    """The response while no version of a model is in memory."""
    retry, message = RETRY_AFTER, "the model is still loading"
    if model.rejected and model.unloaded:
        retry = ("retry-after", str(max(1, round(model.rejected.remaining_s))))
        message = "the model is not in memory and its version was rejected; see /model"
    elif model.unloaded:
        message = "the model is not in memory and is being loaded; retry in a moment"
    return error_response(503, "TEMPORARILY_UNAVAILABLE", message, retry)


def _queued_rows(model: ServedModel) -> int:
    version = model.current
    return version.pyfunc.service.batcher.queued_rows if version else 0


def _is_loaded(model: ServedModel) -> int:
    return int(model.current is not None)


def _mlflow_version() -> Response:
    from mlflow.version import VERSION

    return Response(200, VERSION.encode())
