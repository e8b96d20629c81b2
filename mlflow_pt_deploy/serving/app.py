"""The ASGI application of ``pt-deploy serve``: routes, limits, and who answers.

A request is read here and scored in a thread of its own, which waits in the batcher. Knows
nothing of registries: it asks a slot for its version, once for each request.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mlflow_pt_deploy.serving.metrics import Metrics
from mlflow_pt_deploy.serving.protocol import Answer, answer, failure
from mlflow_pt_deploy.serving.slot import Slot
from mlflow_pt_deploy.serving.ticket import Caller

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Page = Callable[[], Answer]

MAX_BODY_BYTES = 4 * 2**20
# A body must have come within this time, or a slow client would hold its connection for ever.
BODY_S = 30.0
# A request holds a thread while it waits for its batch; asyncio's own pool (cores + 4) would keep
# batches small. More requests than threads are refused, so that none waits outside the deadline.
THREADS = 256
# Whether a client left is looked at only when his answer takes longer than this.
_PATIENCE_S = 0.05
_JSON = (b"content-type", b"application/json")
_CLOSE = (b"connection", b"close")
DEADLINE_HEADER = b"x-deadline-ms"


class App:
    """The application for one or more models.

    Args:
        slots: Models by name; ``/invocations`` is for the first.
        metrics: Told of each answer.
        max_body_bytes: Longest request body.
    """

    def __init__(
        self,
        slots: Mapping[str, Slot],
        *,
        metrics: Metrics | None = None,
        max_body_bytes: int = MAX_BODY_BYTES,
    ) -> None:
        self._slots = slots
        self._metrics = metrics or Metrics()
        self._max_body_bytes = max_body_bytes
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="score")
        self._in_flight = 0
        first = next(iter(slots.values()))
        self._scored = {f"/models/{name}/invocations": slot for name, slot in slots.items()}
        self._scored["/invocations"] = first
        self._pages: dict[str, Page] = {
            "/ping": self._ping,
            "/health": self._ping,
            "/version": _mlflow_version,
            "/livez": lambda: Answer(200, b"{}"),
            "/readyz": self._ready,
            "/model": lambda: _page(first.about()),
            "/models": lambda: _page([slot.about() for slot in slots.values()]),
            **{f"/models/{name}": _about(slot) for name, slot in slots.items()},
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        path, method = scope["path"], scope["method"]
        slot = self._scored.get(path)
        if slot is not None and method == "POST":
            await self._invoke(slot, scope, receive, send)
        elif path in self._pages and method in ("GET", "HEAD"):
            await _respond(send, self._pages[path]())
        elif slot is not None or path in self._pages:
            allowed = b"POST" if slot else b"GET, HEAD"
            message = f"this path takes {allowed.decode()}"
            error = failure(405, "INVALID_PARAMETER_VALUE", message, (b"allow", allowed))
            await _respond(send, error)
        else:
            await _respond(send, failure(404, "ENDPOINT_NOT_FOUND", "there is no such path"))

    async def _invoke(self, slot: Slot, scope: Scope, receive: Receive, send: Send) -> None:
        start = time.perf_counter()
        headers = dict(scope["headers"])
        body = await _read(receive, headers.get(b"content-length"), self._max_body_bytes)
        version = slot.current
        if isinstance(body, Answer):
            result = body
        elif version is None:
            message = "the model is still loading"
            result = failure(503, "TEMPORARILY_UNAVAILABLE", message, (b"retry-after", b"1"))
        elif self._in_flight >= THREADS:
            message = f"{THREADS} requests are waiting already. Try again later."
            result = failure(429, "RESOURCE_EXHAUSTED", message, (b"retry-after", b"1"))
        else:
            caller = Caller(_deadline(headers.get(DEADLINE_HEADER)))
            media = headers.get(b"content-type", b"").decode("latin1")
            self._in_flight += 1
            watch = _Watch(receive, caller)
            try:
                loop = asyncio.get_running_loop()
                result = await loop.run_in_executor(
                    self._threads, answer, version, body, media, caller
                )
            finally:
                self._in_flight -= 1
                watch.end()
            if caller.left:
                result = _LEFT
        await _respond(send, result, *([version.header] if version else []))
        seconds = time.perf_counter() - start
        if version and result.status == 200:
            version.seconds.append(seconds)
        label = version.label if version else ""
        self._metrics.answered(slot.name, label, result, seconds)

    def _ready(self) -> Answer:
        if all(slot.current for slot in self._slots.values()):
            return Answer(200, b'{"status": "ready"}')
        return Answer(503, b'{"status": "loading"}', "TEMPORARILY_UNAVAILABLE")

    def _ping(self) -> Answer:
        return Answer(self._ready().status, b"\n")


class _Watch:
    """Notices that a client left while his answer is on its way."""

    def __init__(self, receive: Receive, caller: Caller) -> None:
        self._receive = receive
        self._caller = caller
        self._task: asyncio.Task[None] | None = None
        self._timer = asyncio.get_running_loop().call_later(_PATIENCE_S, self._begin)

    def end(self) -> None:
        self._timer.cancel()
        if self._task is not None:
            self._task.cancel()

    def _begin(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._listen())

    async def _listen(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._caller.left = True


_LEFT = failure(499, "CANCELLED", "the client left")


async def _read(receive: Receive, length: bytes | None, limit: int) -> bytes | Answer:
    """The whole body, or why it is not taken."""
    if length and length.isdigit() and int(length) > limit:
        return _too_long(limit)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            while True:
                part = await receive()
                if part["type"] == "http.disconnect":
                    return _LEFT
                body += part.get("body", b"")
                if len(body) > limit:
                    return _too_long(limit)
                if not part.get("more_body"):
                    return bytes(body)
    except TimeoutError:
        message = f"the body did not come within {BODY_S:g} s"
        return failure(408, "DEADLINE_EXCEEDED", message, _CLOSE)


def _too_long(limit: int) -> Answer:
    message = f"the body is longer than {limit} bytes; send fewer rows"
    return failure(413, "INVALID_PARAMETER_VALUE", message, _CLOSE)


def _deadline(header: bytes | None) -> float | None:
    """A client's own deadline in milliseconds from now, by `time.monotonic`; nonsense is none."""
    if header is None or not header.isdigit() or len(header) > 9:
        return None
    return time.monotonic() + int(header) / 1000


def _mlflow_version() -> Answer:
    from mlflow.version import VERSION

    return Answer(200, VERSION.encode())


def _about(slot: Slot) -> Page:
    return lambda: _page(slot.about())


def _page(content: object) -> Answer:
    return Answer(200, json.dumps(content).encode())


async def _respond(send: Send, result: Answer, *more: tuple[bytes, bytes]) -> None:
    length = (b"content-length", str(len(result.body)).encode())
    headers = [_JSON, length, *result.headers, *more]
    await send({"type": "http.response.start", "status": result.status, "headers": headers})
    await send({"type": "http.response.body", "body": result.body})
