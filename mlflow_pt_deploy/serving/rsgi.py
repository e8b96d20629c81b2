"""RSGI adapter of `Application`, for granian.

Specification: https://github.com/emmett-framework/granian/blob/master/docs/spec/RSGI.md
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from mlflow_pt_deploy.serving.http.request import DisconnectedError, Request

if TYPE_CHECKING:
    from mlflow_pt_deploy.serving.app import Application


class _Body:
    """A request body from granian's HTTP protocol object."""

    __slots__ = ("_protocol",)

    def __init__(self, protocol: Any) -> None:
        self._protocol = protocol

    async def read(self) -> bytes:
        try:
            body: bytes = await self._protocol()
        except RuntimeError as error:  # granian's RSGIProtocolError, RSGIProtocolClosed
            raise DisconnectedError from error
        return body

    async def chunks(self) -> AsyncIterator[bytes]:
        try:
            async for part in self._protocol:
                yield part
        except RuntimeError as error:
            raise DisconnectedError from error

    async def disconnected(self) -> None:
        await self._protocol.client_disconnect()


class RsgiAdapter:
    """An RSGI application.

    Args:
        application: Answers the requests.
    """

    def __init__(self, application: Application) -> None:
        self._application = application

    def __rsgi_init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._application.start(loop)

    def __rsgi_del__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._application.stop()

    async def __rsgi__(self, scope: Any, protocol: Any) -> None:
        """Answer one request."""
        request = Request(scope.method, scope.path, scope.headers, _Body(protocol))
        response = await self._application.respond(request)
        headers = [("content-type", response.content_type), *response.headers]
        protocol.response_bytes(response.status, headers, response.body)
