"""The application of ``pt-deploy serve``: routes, authorization, and the path of a request.

An adapter (`rsgi`, `asgi`) passes it a `Request` and sends the `Response`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

from mlflow_pt_deploy.serving.batching.request import RequestContext
from mlflow_pt_deploy.serving.http.auth import TokenAuth
from mlflow_pt_deploy.serving.http.deadline import DEADLINE_HEADER, Deadline
from mlflow_pt_deploy.serving.http.mlflow_protocol import PARQUET_READER, MlflowFormat
from mlflow_pt_deploy.serving.http.open_inference import (
    MODELS,
    OpenInferenceFormat,
    as_error,
    is_open_inference,
    split_version,
)
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
)
from mlflow_pt_deploy.serving.http.scoring_format import (
    JSON,
    MAX_INLINE_BYTES,
    ScoringFormat,
    error_to_response,
    parse_and_encode,
)
from mlflow_pt_deploy.serving.http.webhook import WEBHOOK_PATH, WebhookReceiver
from mlflow_pt_deploy.serving.lifecycle.served_model import ServedModel
from mlflow_pt_deploy.serving.model.explaining import ExplanationThreads
from mlflow_pt_deploy.serving.model.loaded_model import LoadedModel
from mlflow_pt_deploy.serving.monitoring.drift import DriftWatch
from mlflow_pt_deploy.serving.monitoring.feedback import FeedbackCollector
from mlflow_pt_deploy.serving.observability.access_log import AccessLog
from mlflow_pt_deploy.serving.observability.metrics import Metrics
from mlflow_pt_deploy.serving.observability.tracing import RequestTracer
from mlflow_pt_deploy.serving.pages import (
    ADMIN,
    PROBE,
    SCORING,
    Page,
    Pages,
    unavailable,
    unknown_version,
)
from mlflow_pt_deploy.serving.rollout.canary import Canary
from mlflow_pt_deploy.serving.rollout.running_canary import RunningCanary
from mlflow_pt_deploy.serving.rollout.shadow_client import ShadowClient
from mlflow_pt_deploy.serving.worker_state import WorkerStates

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


class ScoringRoute(NamedTuple):
    """A path that scores.

    Attributes:
        path: The path, without the version of a model.
        model: The model.
        format: The protocol of body and response.
        version: The version in the path; empty if there is none.
    """

    path: str
    model: ServedModel
    format: ScoringFormat
    version: str = ""


Route = ScoringRoute | Page | WebhookReceiver


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
        shadows: Samples answered requests, if a model has a shadow.
        canaries: Canaries by model.
        feedback: Remembers answers and takes feedback on them, if given.
        routes: Additional paths, each with the path that answers it; see `platform.routes_from`.
        is_listening: Whether the other ports of this worker are open.
        drift: Compares what is served with the rows of the promotion, if given.
        on_start, on_stop: Called when the event loop starts and ends.
        on_registry_change: Called on a thread when MLflow's webhook arrives; None: there is no
            ``/webhook``.

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
        shadows: ShadowClient | None = None,
        canaries: Mapping[str, Canary] | None = None,
        feedback: FeedbackCollector | None = None,
        routes: Mapping[str, str] | None = None,
        is_listening: Callable[[], bool] = lambda: True,
        drift: DriftWatch | None = None,
        on_start: Callable[[asyncio.AbstractEventLoop], None] = lambda loop: None,
        on_stop: Callable[[], None] = lambda: None,
        on_registry_change: Callable[[], None] | None = None,
    ) -> None:
        self._auth = auth or TokenAuth()
        self._webhook: WebhookReceiver | None = None
        if self._auth.webhook and on_registry_change is not None:
            self._webhook = WebhookReceiver(self._auth.webhook, on_registry_change)
        self._metrics = metrics or Metrics()
        self._access_log = access_log
        self._tracer = tracer
        self._shadows = shadows or ShadowClient()
        self._feedback = feedback
        self._max_body_bytes = max_body_bytes
        self._on_start, self._on_stop = on_start, on_stop
        self.active = 0
        self._request_ids = RequestIds()
        self._parsers = ThreadPoolExecutor(_PARSER_THREADS, thread_name_prefix="parse")
        self._explanations = ExplanationThreads()
        self._in_flight = dict.fromkeys(models, 0)
        self._canaries = canaries or {}
        self._pages = Pages(
            models,
            self._metrics,
            hang_s,
            states,
            is_listening,
            drift=drift,
            canaries=self._canaries,
            feedback=feedback,
        )
        self._scoring = _scoring_routes(models)
        for route, path in (routes or {}).items():
            if path in self._scoring:
                self._scoring.setdefault(route, self._scoring[path]._replace(path=route))
            else:
                self._pages.add_route(route, path)
        for name, model in models.items():
            self._metrics.gauge("queue_rows", name, partial(_queued_rows, model))
            self._metrics.gauge("in_flight", name, partial(self._in_flight.__getitem__, name))
            self._metrics.gauge("loaded", name, partial(_is_loaded, model))

    @property
    def hangs(self) -> bool:
        """Whether a model has been computing one batch for longer than `hang_s`."""
        return self._pages.hangs

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Prepare for requests on an event loop."""
        self._on_start(loop)

    def stop(self) -> None:
        """Release threads and connections; the event loop has ended."""
        self._on_stop()
        self._parsers.shutdown(wait=False, cancel_futures=True)
        self._explanations.close()
        PARQUET_READER.close()
        self._shadows.close()
        if self._tracer is not None:
            self._tracer.close()

    async def respond(self, request: Request) -> Response:
        """Answer one request; raises nothing."""
        route = self._scoring.get(request.path) or self._find(request.path)
        request_id = self._request_ids.of(request.headers)
        self.active += 1
        try:
            if isinstance(route, ScoringRoute) and request.method == "POST":
                response = await self._score(route, request, request_id)
            elif isinstance(route, Page) and route.takes_body:
                response = await self._take(route, request)
            else:
                response = await self._read_only(route, request)
        except Rejection as rejection:
            await request.discard()
            response = rejection.response
        finally:
            self.active -= 1
        if response.error_code and is_open_inference(request.path):
            response = as_error(response)
        self._record(route, request, response, request_id)
        headers = (("x-request-id", request_id), *response.headers)
        if response.model_version:
            headers = (("x-model-version", response.model_version), *headers)
        return response._replace(headers=headers)

    def _find(self, path: str) -> Route | None:
        """The page of a path, or the route of a path that names a version."""
        if not path.startswith(MODELS):
            return self._webhook if path == WEBHOOK_PATH else self._pages.find(path)
        path, version = split_version(path)
        route = self._scoring.get(path)
        return route._replace(version=version) if route else self._pages.find(path, version)

    async def _score(self, route: ScoringRoute, request: Request, request_id: str) -> Response:
        """Score the rows of one request.

        Raises:
            Rejection: It is rejected before its body is parsed.
        """
        version, context = self._admit(route, request)
        model = route.model
        canary = self._canaries[model.name].running if self._canaries else None
        if canary and not canary.takes(version.label, route.version, request.headers, request_id):
            canary = None
        self._in_flight[model.name] += 1
        try:
            return await self._predict(route, version, request, context, request_id, canary)
        except Exception as error:
            return self._failure(error, version.label)
        finally:
            self._in_flight[model.name] -= 1

    def _admit(self, route: ScoringRoute, request: Request) -> tuple[LoadedModel, RequestContext]:
        """The version that answers this request, and its context with the deadline.

        Raises:
            Rejection: The token is wrong, no version is in memory, another one than the path's
                serves, or the server is overloaded.
        """
        model = route.model
        if not self._auth.can_score(request.headers.get("authorization")):
            raise Rejection(_unauthorized("a token"))
        version = model.acquire()
        if version is None:
            raise Rejection(unavailable(model))
        if route.version and route.version != version.label:
            canary = self._canaries[model.name].running if self._canaries else None
            if canary is None or canary.label != route.version:
                raise Rejection(unknown_version(model.name, version.label))
        service = version.pyfunc.service
        deadline = Deadline.from_header(
            request.headers.get(DEADLINE_HEADER), service.options.deadline_ms
        )
        in_flight = self._in_flight[model.name]
        if reason := service.rejection(deadline.remaining_s(), in_flight):
            overloaded = error_response(429, "RESOURCE_EXHAUSTED", reason, RETRY_AFTER)
            raise Rejection(overloaded._replace(model_version=version.label))
        return version, RequestContext(deadline.expires_at)

    def _failure(self, error: Exception, label: str) -> Response:
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
        return error_to_response(error, label)

    async def _predict(
        self,
        route: ScoringRoute,
        version: LoadedModel,
        request: Request,
        context: RequestContext,
        request_id: str,
        canary: RunningCanary | None,
    ) -> Response:
        protocol, name = route.format, route.model.name
        service = version.pyfunc.service
        body = await request.read(self._max_body_bytes)
        kind = protocol.body_type(request.headers)
        small = kind.media == JSON and len(body) <= MAX_INLINE_BYTES
        if small and service.loaded.preprocessor.column == "text":
            found = protocol.parse(service, body, kind)
        else:
            loop = asyncio.get_running_loop()
            work = partial(parse_and_encode, protocol, service, body, kind)
            found = await loop.run_in_executor(self._parsers, work)
        if found.explain:  # by the champion
            canary = None
        if canary is not None:
            begun = time.perf_counter()
            answer = await canary.predict(found, context, service, self._parsers)
            if answer is not None:
                content = protocol.write(answer, found, canary.label)
                return Response(200, content, model_version=canary.label)
            request.lost_s = time.perf_counter() - begun
        predictions = service.submit(found.rows, found.top_k, context, found.encoded)
        if service.runs_inline:
            texts = await predictions
        else:
            texts = await self._watched(predictions, request, context)
        if canary is not None:  # it failed on rows that the champion answered
            canary.count_failure()
        if name in self._shadows.targets:
            self._shadows.offer(name, version.label, request_id, found.rows, texts)
        if found.explain:
            explainer = version.pyfunc.explainer
            explained = self._explanations.explain(explainer, found.rows, texts, context)
            texts = await self._watched(asyncio.ensure_future(explained), request, context)
        content = protocol.write(texts, found, version.label)
        return Response(
            200, content, model_version=version.label, predictions=texts, explained=found.explain
        )

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

    async def _take(self, page: Page, request: Request) -> Response:
        """Answer a request whose body is not rows.

        Raises:
            Rejection: Its method is not POST, the token is wrong, or the body is too long.
        """
        if request.method != "POST":
            raise Rejection(_not_allowed("POST"))
        if not self._auth.can_score(request.headers.get("authorization")):
            raise Rejection(_unauthorized("a token"))
        try:
            body = await request.read(self._max_body_bytes)
        except Exception as error:
            return self._failure(error, "")
        return await asyncio.get_running_loop().run_in_executor(self._parsers, page.write, body)

    async def _read_only(self, route: Route | None, request: Request) -> Response:
        """Answer a request that does not score.

        Raises:
            Rejection: There is no such page, its method is not allowed, or the token is wrong.
        """
        if route is None:
            what = "model" if request.path.startswith(MODELS) else "path"
            raise Rejection(error_response(404, "ENDPOINT_NOT_FOUND", f"there is no such {what}"))
        if isinstance(route, WebhookReceiver) and request.method == "POST":
            return await route.answer(request)
        if not isinstance(route, Page) or request.method not in ("GET", "HEAD"):
            raise Rejection(_not_allowed("GET, HEAD" if isinstance(route, Page) else "POST"))
        token = request.headers.get("authorization")
        if route.access == SCORING and not self._auth.can_score(token):
            raise Rejection(_unauthorized("a token"))
        if route.access == ADMIN:
            if not self._auth.can_read_admin(token):
                raise Rejection(_unauthorized("an admin token"))
            loop = asyncio.get_running_loop()
            response = await loop.run_in_executor(self._parsers, route.write)
        else:
            response = route.write()
        await request.discard()
        return response

    def _record(
        self,
        route: Route | None,
        request: Request,
        response: Response,
        request_id: str,
    ) -> None:
        """Count, log and trace a response."""
        seconds = time.perf_counter() - request.received_at
        label = response.model_version
        if isinstance(route, ScoringRoute):
            model = route.model
            self._metrics.response_sent(model.name, label, response, seconds)
            if not response.explained:
                if counts := model.counts.get(label):
                    counts.count_response(response.status, seconds - request.lost_s)
                current = model.current
                if current is not None and current.label == label and response.status == 200:
                    current.seconds.append(seconds)
            if self._feedback is not None and response.predictions:
                self._feedback.remember(request_id, model.name, label, response.predictions)
            if self._tracer is not None:
                parent = request.headers.get("traceparent") or ""
                self._tracer.response_sent(model.name, label, route.path, response, seconds, parent)
        if self._access_log is None or (isinstance(route, Page) and route.access == PROBE):
            return
        self._access_log.write(route.path if route else "-", response, seconds, request_id)


def _scoring_routes(models: Mapping[str, ServedModel]) -> dict[str, ScoringRoute]:
    """Routes by path, without versions."""
    first = next(iter(models.values()))
    protocol, explaining = MlflowFormat(), MlflowFormat(explain=True)
    routes = [
        ScoringRoute("/invocations", first, protocol),
        ScoringRoute("/explain", first, explaining),
    ]
    for name, model in models.items():
        routes.append(ScoringRoute(f"/models/{name}/invocations", model, protocol))
        routes.append(ScoringRoute(f"/models/{name}/explain", model, explaining))
        routes.append(ScoringRoute(f"{MODELS}{name}/infer", model, OpenInferenceFormat(name)))
    return {route.path: route for route in routes}


def _not_allowed(allowed: str) -> Response:
    message = f"this path takes {allowed}"
    return error_response(405, "INVALID_PARAMETER_VALUE", message, ("allow", allowed))


def _unauthorized(token: str) -> Response:
    message = f"send {token}: Authorization: Bearer ..."
    return error_response(401, "UNAUTHENTICATED", message, ("www-authenticate", "Bearer"))


def _queued_rows(model: ServedModel) -> int:
    version = model.current
    return version.pyfunc.service.batcher.queued_rows if version else 0


def _is_loaded(model: ServedModel) -> int:
    return int(model.current is not None)
