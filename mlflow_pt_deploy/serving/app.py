"""The ASGI application of ``pt-deploy serve``: routes, limits, and who answers.

A request is read here and scored in a thread of its own, which waits in the batcher; common ones
never come here (see `quick`). Knows nothing of registries: it asks a slot for its
version, once for each request.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from mlflow_pt_deploy.serving.batching.request import Caller
from mlflow_pt_deploy.serving.front import Front
from mlflow_pt_deploy.serving.http.auth import Guard
from mlflow_pt_deploy.serving.http.mlflow_protocol import (
    DEADLINE_HEADER,
    LATER,
    LEFT,
    Answer,
    answer,
    deadline,
    failure,
)
from mlflow_pt_deploy.serving.http.openapi import document
from mlflow_pt_deploy.serving.http.request_body import (
    CLOSE,
    MAX_BODY_BYTES,
    Receive,
    Watch,
    read_body,
)
from mlflow_pt_deploy.serving.lifecycle.served_model import Slot
from mlflow_pt_deploy.serving.observability.access_log import AccessLog
from mlflow_pt_deploy.serving.observability.metrics import Metrics
from mlflow_pt_deploy.serving.observability.tracing import Spans
from mlflow_pt_deploy.serving.quick import Quick
from mlflow_pt_deploy.serving.siblings import Siblings

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Page = Callable[[], Answer]

# A request holds a thread while it waits for its batch; asyncio's own pool (cores + 4) would keep
# batches small. More requests than threads are refused, so that none waits outside the deadline.
THREADS = 256


class App:
    """The application for one or more models.

    Args:
        slots: Models by name; ``/invocations`` is for the first.
        guard: Who may score and who may look.
        metrics: Told of each answer.
        access: Told of each answer too, if anything.
        spans: Told of each answer of a model too, if anything.
        max_body_bytes: Longest request body.
        siblings: The other replicas, where there are any.
        hang_s: Seconds after which a model that computes the same batch still is taken to hang; 0:
            never.

    Attributes:
        spans: As given.
        quick: Answers common requests.
        front: Reads those, while the server runs, where there is one.
    """

    def __init__(
        self,
        slots: Mapping[str, Slot],
        *,
        guard: Guard | None = None,
        metrics: Metrics | None = None,
        access: AccessLog | None = None,
        spans: Spans | None = None,
        max_body_bytes: int = MAX_BODY_BYTES,
        siblings: Siblings | None = None,
        hang_s: float = 0.0,
    ) -> None:
        self._slots = slots
        self._guard = guard or Guard()
        self._metrics = metrics or Metrics()
        self._access = access
        self.spans = spans
        self._max_body_bytes = max_body_bytes
        self._siblings = siblings
        self._hang_s = hang_s
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="score")
        self._in_flight = dict.fromkeys(slots, 0)
        self._in_threads = 0
        first = next(iter(slots.values()))
        self._scored = {f"/models/{name}/invocations": slot for name, slot in slots.items()}
        self._scored["/invocations"] = first
        self._probes: dict[str, Page] = {
            "/ping": self._ping,
            "/health": self._ping,
            "/version": _mlflow_version,
            "/livez": self._alive,
            "/readyz": self._ready,
            "/openapi.json": self._openapi,
        }
        self._looks: dict[str, Page] = {
            "/metrics": self._exposed,
            "/model": lambda: _page(first.about()),
            "/models": lambda: _page([slot.about() for slot in slots.values()]),
            **{f"/models/{name}": _about(slot) for name, slot in slots.items()},
        }
        self._of_all = {"/ping", "/health", "/readyz", *self._looks}
        self.quick = Quick(self._scored, self._guard, self._tell, self._in_flight)
        self.front: Front | None = None
        for name, slot in slots.items():
            self._metrics.gauge("queue_rows", name, _queued(slot))
            self._metrics.gauge("in_flight", name, partial(self._in_flight.__getitem__, name))
            self._metrics.gauge("loaded", name, _is_loaded(slot))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        start = time.perf_counter()
        path = scope["path"]
        slot = self._scored.get(path)
        if slot is not None and scope["method"] == "POST":
            result = await self._invoke(slot, dict(scope["headers"]), receive)
        else:
            result = self._read_only(path, scope)
            if self._siblings and path in self._of_all and result.status in (200, 503):
                result = await self._siblings.whole(path, result)
        await _respond(send, result)
        parent = dict(scope["headers"]).get(b"traceparent", b"") if self.spans else b""
        self._tell(slot, path, result, time.perf_counter() - start, (parent,))

    def own(self, path: str) -> Answer:
        """What this replica by itself answers to a path that is read, whoever asks."""
        page = self._probes.get(path) or self._looks.get(path)
        return page() if page else failure(404, "ENDPOINT_NOT_FOUND", "there is no such path")

    def _tell(
        self,
        slot: Slot | None,
        path: str,
        result: Answer,
        seconds: float,
        parents: Sequence[bytes],
    ) -> None:
        """Count and log an answer that went to so many."""
        version = result.version
        label = version.label if version else ""
        if slot is not None:
            self._metrics.answered(slot.name, label, result, seconds, len(parents))
            if version and result.status == 200:
                version.seconds.append(seconds)
            if self.spans is not None:
                for parent in parents:
                    self.spans.answered(slot.name, label, path, result, seconds, parent)
        if self._access is not None and path not in self._probes:
            route = path if slot or path in self._looks else "-"
            for _ in parents:
                self._access.write(route, label, result, seconds)

    def _read_only(self, path: str, scope: Scope) -> Answer:
        """Any path but a request to score."""
        page = self._probes.get(path) or self._looks.get(path)
        if page is None and path not in self._scored:
            return failure(404, "ENDPOINT_NOT_FOUND", "there is no such path")
        if page is None or scope["method"] not in ("GET", "HEAD"):
            allowed = "GET, HEAD" if page else "POST"
            header = (b"allow", allowed.encode())
            return failure(405, "INVALID_PARAMETER_VALUE", f"this path takes {allowed}", header)
        authorization = dict(scope["headers"]).get(b"authorization")
        if path in self._looks and not self._guard.may_look(authorization):
            return _who("an admin token")
        return page()

    async def _invoke(self, slot: Slot, headers: Mapping[bytes, bytes], receive: Receive) -> Answer:
        """Read and score one request."""
        if not self._guard.may_score(headers.get(b"authorization")):
            return _who("a token")
        body = await read_body(receive, headers.get(b"content-length"), self._max_body_bytes)
        if isinstance(body, Answer):
            return body
        version = slot.ask()  # from here on this one, whatever is promoted meanwhile
        if version is None:
            return _absent(slot)
        if self._in_threads >= THREADS:
            message = f"{THREADS} requests are waiting already. Try again later."
            return failure(429, "RESOURCE_EXHAUSTED", message, LATER)
        caller = Caller(deadline(headers.get(DEADLINE_HEADER)))
        media = headers.get(b"content-type", b"").decode("latin1")
        self._in_flight[slot.name] += 1
        self._in_threads += 1
        watch = Watch(receive, caller)
        try:
            work = partial(answer, version, body, media, caller)
            result = await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:
            self._in_flight[slot.name] -= 1
            self._in_threads -= 1
            watch.end()
        return LEFT if caller.left else result

    def _alive(self) -> Answer:
        hangs = any(_running_s(slot) > self._hang_s for slot in self._slots.values())
        if self._hang_s and hangs:
            return Answer(503, b'{"status": "hangs"}', "TEMPORARILY_UNAVAILABLE")
        return Answer(200, b"{}")

    def _ready(self) -> Answer:
        alive = self._alive()
        if alive.status != 200:
            return alive
        if all(slot.current or slot.unloaded for slot in self._slots.values()):
            return Answer(200, b'{"status": "ready"}')
        return Answer(503, b'{"status": "loading"}', "TEMPORARILY_UNAVAILABLE")

    def _ping(self) -> Answer:
        return Answer(self._ready().status, b"\n")

    def _openapi(self) -> Answer:
        current = next(iter(self._slots.values())).current
        column = current.pyfunc.loaded.preprocessor.column if current else None
        return _page(document(self._slots, column))

    def _exposed(self) -> Answer:
        text = self._metrics.expose()
        if text is None:
            message = "metrics need an extra: pip install 'mlflow-pt-deploy[serve]'"
            return failure(501, "NOT_IMPLEMENTED", message)
        return Answer(200, text, content_type=self._metrics.content_type)


def _who(token: str) -> Answer:
    message = f"send {token}: Authorization: Bearer ..."
    return failure(401, "UNAUTHENTICATED", message, (b"www-authenticate", b"Bearer"), CLOSE)


def _absent(slot: Slot) -> Answer:
    """Why no version answers, and when to ask again."""
    code, later, message = "TEMPORARILY_UNAVAILABLE", LATER, "the model is still loading"
    if slot.refused and slot.unloaded:
        later = (b"retry-after", b"%d" % max(1, slot.refused.left_s))
        message = "the model is not in memory and may not be loaded; /model says why"
    elif slot.unloaded:
        message = "the model is not in memory and is being loaded now. Try again in a moment."
    return failure(503, code, message, later)


def _queued(slot: Slot) -> Callable[[], int]:
    return lambda: version.pyfunc.batcher.queued_rows if (version := slot.current) else 0


def _running_s(slot: Slot) -> float:
    return version.pyfunc.batcher.calls.running_s if (version := slot.current) else 0.0


def _is_loaded(slot: Slot) -> Callable[[], int]:
    return lambda: int(slot.current is not None)


def _mlflow_version() -> Answer:
    from mlflow.version import VERSION

    return Answer(200, VERSION.encode())


def _about(slot: Slot) -> Page:
    return lambda: _page(slot.about())


def _page(content: object) -> Answer:
    return Answer(200, json.dumps(content).encode())


async def _respond(send: Send, result: Answer) -> None:
    headers = [
        (b"content-type", result.content_type),
        (b"content-length", str(len(result.body)).encode()),
        *result.headers,
    ]
    if result.version is not None:
        headers.append(result.version.header)
    await send({"type": "http.response.start", "status": result.status, "headers": headers})
    await send({"type": "http.response.body", "body": result.body})
