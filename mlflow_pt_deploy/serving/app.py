"""The application of ``pt-deploy serve``: routes, authorization, and what is recorded.

An adapter (`rsgi`, `asgi`) passes it a `Request` and sends the `Response`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from mlflow_pt_deploy.serving.http.auth import TokenAuth
from mlflow_pt_deploy.serving.http.mlflow_protocol import PARQUET_READER
from mlflow_pt_deploy.serving.http.open_inference import (
    MODELS,
    as_error,
    is_open_inference,
    split_version,
)
from mlflow_pt_deploy.serving.http.rejection import Rejection, not_allowed, unauthorized
from mlflow_pt_deploy.serving.http.request import MAX_BODY_BYTES, Request
from mlflow_pt_deploy.serving.http.request_id import RequestIds
from mlflow_pt_deploy.serving.http.response import Response, error_response
from mlflow_pt_deploy.serving.http.webhook import WEBHOOK_PATH, WebhookReceiver
from mlflow_pt_deploy.serving.lifecycle.served_model import ServedModel
from mlflow_pt_deploy.serving.monitoring.drift import DriftWatch
from mlflow_pt_deploy.serving.monitoring.feedback import FeedbackCollector
from mlflow_pt_deploy.serving.observability.access_log import AccessLog
from mlflow_pt_deploy.serving.observability.metrics import Metrics
from mlflow_pt_deploy.serving.observability.tracing import RequestTracer
from mlflow_pt_deploy.serving.pages import ADMIN, PROBE, SCORING, Page, Pages
from mlflow_pt_deploy.serving.rollout.canary.canary import Canary
from mlflow_pt_deploy.serving.rollout.shadow.client import ShadowClient
from mlflow_pt_deploy.serving.scoring import Scorer, ScoringRoute, failure, scoring_routes
from mlflow_pt_deploy.serving.worker_state import WorkerStates

_PARSER_THREADS = 2

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
        self._feedback = feedback
        self._max_body_bytes = max_body_bytes
        self._on_start, self._on_stop = on_start, on_stop
        self.active = 0
        self._request_ids = RequestIds()
        self._parsers = ThreadPoolExecutor(_PARSER_THREADS, thread_name_prefix="parse")
        canaries = canaries or {}
        self._scorer = Scorer(
            models,
            self._auth,
            self._parsers,
            max_body_bytes,
            canaries,
            shadows or ShadowClient(),
        )
        self._pages = Pages(
            models,
            self._metrics,
            hang_s,
            states,
            is_listening,
            drift=drift,
            canaries=canaries,
            feedback=feedback,
        )
        self._scoring = scoring_routes(models)
        for route, path in (routes or {}).items():
            if path in self._scoring:
                self._scoring.setdefault(route, self._scoring[path]._replace(path=route))
            else:
                self._pages.add_route(route, path)
        for name, model in models.items():
            self._metrics.gauge("queue_rows", name, partial(_queued_rows, model))
            self._metrics.gauge(
                "in_flight", name, partial(self._scorer.in_flight.__getitem__, name)
            )
            self._metrics.gauge("loaded", name, partial(_is_loaded, model))
            self._metrics.gauge("device_batch_limit", name, partial(_batch_limit, model))
            self._metrics.count_out_of_memory(name, partial(_out_of_memory, model))

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
        self._scorer.close()
        PARQUET_READER.close()
        if self._tracer is not None:
            self._tracer.close()

    async def respond(self, request: Request) -> Response:
        """Answer one request; raises nothing."""
        route = self._scoring.get(request.path) or self._find(request.path)
        request_id = self._request_ids.of(request.headers)
        self.active += 1
        try:
            if isinstance(route, ScoringRoute) and request.method == "POST":
                response = await self._scorer.score(route, request, request_id)
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

    async def _take(self, page: Page, request: Request) -> Response:
        """Answer a request whose body is not rows.

        Raises:
            Rejection: Its method is not POST, the token is wrong, or the body is too long.
        """
        if request.method != "POST":
            raise Rejection(not_allowed("POST"))
        if not self._auth.can_score(request.headers.get("authorization")):
            raise Rejection(unauthorized("a token"))
        try:
            body = await request.read(self._max_body_bytes)
        except Exception as error:
            return failure(error, "", self._max_body_bytes)
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
            raise Rejection(not_allowed("GET, HEAD" if isinstance(route, Page) else "POST"))
        token = request.headers.get("authorization")
        if route.access == SCORING and not self._auth.can_score(token):
            raise Rejection(unauthorized("a token"))
        if route.access == ADMIN:
            if not self._auth.can_read_admin(token):
                raise Rejection(unauthorized("an admin token"))
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


def _queued_rows(model: ServedModel) -> int:
    version = model.current
    return version.pyfunc.service.batcher.queued_rows if version else 0


def _is_loaded(model: ServedModel) -> int:
    return int(model.current is not None)


def _batch_limit(model: ServedModel) -> int:
    version = model.current
    memory = version.device_memory if version else None
    return memory.batch_limit if memory else 0


def _out_of_memory(model: ServedModel) -> int:
    version = model.current
    memory = version.device_memory if version else None
    return memory.out_of_memory if memory else 0
