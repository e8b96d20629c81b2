"""ASGI 3 adapter of `Application`: for uvicorn, for tests, for embedding.

Specification: https://asgi.readthedocs.io
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any

from mlflow_pt_deploy.serving.http.request import DisconnectedError, Request

if TYPE_CHECKING:
    from mlflow_pt_deploy.serving.app import Application

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class _Body:
    """A request body from ASGI's `receive`."""

    __slots__ = ("_receive",)

    def __init__(self, receive: Receive) -> None:
        self._receive = receive

    async def read(self) -> bytes:
        return b"".join([part async for part in self.chunks()])

    async def chunks(self) -> AsyncIterator[bytes]:
        more = True
        while more:
            event = await self._receive()
            if event["type"] == "http.disconnect":
                raise DisconnectedError
            yield event.get("body", b"")
            more = event.get("more_body", False)

    async def disconnected(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass


class AsgiAdapter:
    """An ASGI application.

    Args:
        application: Answers the requests.
    """

    def __init__(self, application: Application) -> None:
        self.application = application

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request, or handle the server's lifespan events."""
        if scope["type"] == "lifespan":
            await self._follow_lifespan(receive, send)
        if scope["type"] != "http":
            return
        headers: dict[str, str] = {
            name.decode("latin1"): value.decode("latin1") for name, value in scope["headers"]
        }
        path = scope["path"].removeprefix(scope.get("root_path", ""))  # where it is mounted
        request = Request(scope["method"], path, headers, _Body(receive))
        response = await self.application.respond(request)
        lines = [
            ("content-type", response.content_type),
            ("content-length", str(len(response.body))),
            *response.headers,
        ]
        encoded = [(name.encode("latin1"), value.encode("latin1")) for name, value in lines]
        await send({"type": "http.response.start", "status": response.status, "headers": encoded})
        await send({"type": "http.response.body", "body": response.body})

    async def _follow_lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        self.application.start(asyncio.get_running_loop())
        await send({"type": "lifespan.startup.complete"})
        await receive()
        self.application.stop()
        await send({"type": "lifespan.shutdown.complete"})
