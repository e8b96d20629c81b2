"""A request as the application sees it, independent of the HTTP server.

The adapters (`rsgi`, `asgi`) implement `Body`. A body is read within limits of size and time. The
body of a rejected request is read and dropped first: a proxy such as nginx treats a response that
comes before the end of the request as a failure of the server, and stops using it.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Protocol

MAX_BODY_BYTES = 4 * 2**20
BODY_TIMEOUT_S = 30.0
"""Most seconds for the whole body to arrive."""
DISCARD_BYTES, DISCARD_TIMEOUT_S = 16 * 2**20, 5.0
"""Most bytes of a rejected request's body that are read before the response, most seconds."""
_SHORT_BYTES = 64 * 2**10


class Headers(Protocol):
    """Request headers by lower-case name."""

    def get(self, name: str, /) -> str | None: ...


class Body(Protocol):
    """The body of a request, which may still have to be received."""

    async def read(self) -> bytes:
        """Read a body whose length is known."""

    def chunks(self) -> AsyncIterator[bytes]:
        """Read the body part by part."""

    async def disconnected(self) -> None:
        """Return when the client closes the connection."""


class BodyTooLongError(Exception):
    """The body is longer than the limit."""


class DisconnectedError(Exception):
    """The client closed the connection before its request was complete."""


class Request:
    """One HTTP request.

    Args:
        method: In capital letters.
        path: Decoded, without the query string.
        headers: By lower-case name.
        body: The body.

    Attributes:
        received_at: Time of arrival by `time.perf_counter`, seconds.
        lost_s: Seconds that a version took which failed, before another one answers.
    """

    __slots__ = ("_body", "_rest", "headers", "lost_s", "method", "path", "received_at")

    def __init__(self, method: str, path: str, headers: Headers, body: Body) -> None:
        self.method = method
        self.path = path
        self.headers = headers
        self.received_at = time.perf_counter()
        self.lost_s = 0.0
        self._body = body
        self._rest: AsyncIterator[bytes] | None = None

    @property
    def content_length(self) -> int | None:
        """Length of the body in bytes from the header; None if there is none (chunked)."""
        length = self.headers.get("content-length")
        if length is None:
            return None if self.headers.get("transfer-encoding") else 0
        return int(length) if length.isdigit() and len(length) < 16 else None

    async def read(self, limit: int) -> bytes:
        """Read the whole body.

        Raises:
            BodyTooLongError: It has more than `limit` bytes.
            DisconnectedError: The client closed the connection.
            TimeoutError: It did not arrive within `BODY_TIMEOUT_S`.
        """
        import asyncio

        length = self.content_length
        if length is not None and length > limit:
            raise BodyTooLongError
        async with asyncio.timeout(BODY_TIMEOUT_S):
            if length is not None:
                return await self._body.read()
            parts: list[bytes] = []
            size = 0
            async for part in self._chunks():
                size += len(part)
                if size > limit:
                    raise BodyTooLongError
                parts.append(part)
            return b"".join(parts)

    async def discard(self) -> None:
        """Read and drop the body, at most `DISCARD_BYTES`, for at most `DISCARD_TIMEOUT_S`."""
        import asyncio

        length = self.content_length
        if length == 0 or (length or 0) > DISCARD_BYTES:
            return
        size = 0
        try:
            async with asyncio.timeout(DISCARD_TIMEOUT_S):
                if length is not None and length <= _SHORT_BYTES and self._rest is None:
                    await self._body.read()  # one step instead of one for each part
                    return
                async for part in self._chunks():
                    size += len(part)
                    if size > DISCARD_BYTES:
                        return
        except (TimeoutError, DisconnectedError):
            return

    async def disconnected(self) -> None:
        """Return when the client closes the connection."""
        await self._body.disconnected()

    def _chunks(self) -> AsyncIterator[bytes]:
        """The parts that are not read yet; granian provides one iterator per request."""
        self._rest = self._rest or self._body.chunks()
        return self._rest
