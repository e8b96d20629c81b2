"""The path of a scoring request: admission, rows, predictions, and versions beside the champion."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

from mlflow_pt_deploy.serving.batching.request import RequestContext
from mlflow_pt_deploy.serving.http.auth import TokenAuth
from mlflow_pt_deploy.serving.http.deadline import DEADLINE_HEADER, Deadline
from mlflow_pt_deploy.serving.http.mlflow_protocol import MlflowFormat
from mlflow_pt_deploy.serving.http.open_inference import MODELS, OpenInferenceFormat
from mlflow_pt_deploy.serving.http.rejection import Rejection, unauthorized
from mlflow_pt_deploy.serving.http.request import (
    BODY_TIMEOUT_S,
    BodyTooLongError,
    DisconnectedError,
    Request,
)
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
from mlflow_pt_deploy.serving.lifecycle.served_model import ServedModel
from mlflow_pt_deploy.serving.model.explaining import ExplanationThreads
from mlflow_pt_deploy.serving.model.loaded_model import LoadedModel
from mlflow_pt_deploy.serving.pages import unavailable, unknown_version
from mlflow_pt_deploy.serving.rollout.canary.canary import Canary
from mlflow_pt_deploy.serving.rollout.canary.running_canary import RunningCanary
from mlflow_pt_deploy.serving.rollout.shadow.client import ShadowClient

# A connection is watched for its end only while a response takes longer than this.
_WATCH_AFTER_S = 0.05


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


class Scorer:
    """Answers scoring requests.

    Args:
        models: Models by name.
        auth: Tokens.
        parsers: Threads for large bodies.
        max_body_bytes: Longest request body.
        canaries: Canaries by model.
        shadows: Samples answered requests, if a model has a shadow.

    Attributes:
        in_flight: Requests that are being answered, by model.
    """

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        auth: TokenAuth,
        parsers: ThreadPoolExecutor,
        max_body_bytes: int,
        canaries: Mapping[str, Canary],
        shadows: ShadowClient,
    ) -> None:
        self.in_flight = dict.fromkeys(models, 0)
        self._auth = auth
        self._parsers = parsers
        self._max_body_bytes = max_body_bytes
        self._canaries = canaries
        self._shadows = shadows
        self._explanations = ExplanationThreads()

    def close(self) -> None:
        """Release threads and sockets."""
        self._explanations.close()
        self._shadows.close()

    async def score(self, route: ScoringRoute, request: Request, request_id: str) -> Response:
        """Score the rows of one request.

        Raises:
            Rejection: It is rejected before its body is parsed.
        """
        version, context = self._admit(route, request)
        model = route.model
        canary = self._canaries[model.name].running if self._canaries else None
        if canary and not canary.takes(version.label, route.version, request.headers, request_id):
            canary = None
        self.in_flight[model.name] += 1
        try:
            return await self._predict(route, version, request, context, request_id, canary)
        except Exception as error:
            return failure(error, version.label, self._max_body_bytes)
        finally:
            self.in_flight[model.name] -= 1

    def _admit(self, route: ScoringRoute, request: Request) -> tuple[LoadedModel, RequestContext]:
        """The version that answers this request, and its context with the deadline.

        Raises:
            Rejection: The token is wrong, no version is in memory, another one than the path's
                serves, or the server is overloaded.
        """
        model = route.model
        if not self._auth.can_score(request.headers.get("authorization")):
            raise Rejection(unauthorized("a token"))
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
        in_flight = self.in_flight[model.name]
        if reason := service.rejection(deadline.remaining_s(), in_flight):
            overloaded = error_response(429, "RESOURCE_EXHAUSTED", reason, RETRY_AFTER)
            raise Rejection(overloaded._replace(model_version=version.label))
        return version, RequestContext(deadline.expires_at)

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
                return Response(200, content, model_version=canary.label, predictions=answer)
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


def scoring_routes(models: Mapping[str, ServedModel]) -> dict[str, ScoringRoute]:
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


def failure(error: Exception, label: str, max_body_bytes: int) -> Response:
    """The response to a request that failed while it was read or scored.

    Args:
        error: What failed.
        label: Label of the version that was asked; empty if none was.
        max_body_bytes: Longest request body.

    Raises:
        Rejection: The body is too long; its rest is still to be read.
    """
    if isinstance(error, BodyTooLongError):
        message = f"the body is longer than {max_body_bytes} bytes; send fewer rows"
        raise Rejection(error_response(413, "INVALID_PARAMETER_VALUE", message))
    if isinstance(error, TimeoutError):
        message = f"the body did not arrive within {BODY_TIMEOUT_S:g} s"
        return error_response(408, "DEADLINE_EXCEEDED", message)
    if isinstance(error, DisconnectedError):
        return CLIENT_DISCONNECTED
    return error_to_response(error, label)
