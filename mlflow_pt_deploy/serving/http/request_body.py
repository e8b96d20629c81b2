"""A request's body on its way here, and whether its sender is there still."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from mlflow_pt_deploy.serving.batching.request import Caller
from mlflow_pt_deploy.serving.http.mlflow_protocol import LEFT, Answer, failure

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

MAX_BODY_BYTES = 4 * 2**20
# A body must have come within this time, or a slow client would hold its connection for ever.
BODY_S = 30.0
CLOSE = (b"connection", b"close")
# Whether a client left is looked at only when his answer takes longer than this.
_PATIENCE_S = 0.05


async def read_body(receive: Receive, length: bytes | None, limit: int) -> bytes | Answer:
    """The whole body, or why it is not taken.

    Args:
        receive: ASGI's.
        length: What the head says of it.
        limit: Most bytes.
    """
    if length and length.isdigit() and int(length) > limit:
        return _too_long(limit)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            while True:
                part = await receive()
                if part["type"] == "http.disconnect":
                    return LEFT
                body += part.get("body", b"")
                if len(body) > limit:
                    return _too_long(limit)
                if not part.get("more_body"):
                    return bytes(body)
    except TimeoutError:
        message = f"the body did not come within {BODY_S:g} s"
        return failure(408, "DEADLINE_EXCEEDED", message, CLOSE)


class Watch:
    """Notices that a client left while his answer is on its way."""

    def __init__(self, receive: Receive, caller: Caller) -> None:
        self._receive = receive
        self._caller = caller
        self._task: asyncio.Task[None] | None = None
        self._timer = asyncio.get_running_loop().call_later(_PATIENCE_S, self._begin)

    def end(self) -> None:
        """Look no more."""
        self._timer.cancel()
        if self._task is not None:
            self._task.cancel()

    def _begin(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._listen())

    async def _listen(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._caller.left = True


def _too_long(limit: int) -> Answer:
    message = f"the body is longer than {limit} bytes; send fewer rows"
    return failure(413, "INVALID_PARAMETER_VALUE", message, CLOSE)
