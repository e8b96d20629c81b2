"""Uvicorn's connection with limits: a request's head must be short and come soon.

The parser in C that uvicorn uses has a limit for neither; a request's body is the `app`'s business.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_BYTES = 64 * 2**10
HEAD_S = 15.0


class BoundedProtocol(HttpToolsProtocol):
    """At most `HEAD_BYTES` of head, and `HEAD_S` until one has come.

    One timer closes an idle connection, however many requests come on it.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._head_open = True
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._rested_s = 0.0  # since when nothing is under way, by the loop's clock

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self.scheme == "http":  # with this limit a TLS transport would never write again
            # What is written goes out at once, not when all that came in this turn has been read.
            transport.set_write_buffer_limits(high=0)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._head_open:
            return
        self._head_bytes += len(data)
        if self._head_timer is None:
            self._start_timer()
        if self._head_bytes > HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(f"The request's head is longer than {HEAD_BYTES} bytes.")

    def on_message_begin(self) -> None:
        self._head_open = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self.close_head()
        super().on_headers_complete()

    def close_head(self) -> None:
        """A head has come, whole."""
        self._head_open = False
        self._head_bytes = 0
        self._stop_timer()

    def on_response_complete(self) -> None:
        """Uvicorn's; but where its timer for an idle connection runs still, it runs on."""
        self._rested_s = self.loop.time()
        if self.pipeline or self.flow.read_paused or self.timeout_keep_alive_task is None:
            super().on_response_complete()
        else:
            self.server_state.total_requests += 1

    @property
    def busy(self) -> bool:
        """Whether a request is under way."""
        return self.cycle is not None and not self.cycle.response_complete

    def rested_s(self) -> float:
        """Seconds since the last answer; 0 while a request is under way."""
        return 0.0 if self.busy else self.loop.time() - self._rested_s

    def timeout_keep_alive_handler(self) -> None:
        """Close the connection, unless something has come since the timer was set."""
        self.timeout_keep_alive_task = None
        if self.transport.is_closing():
            return
        left_s = self.timeout_keep_alive - self.rested_s()
        if left_s <= 0:
            super().timeout_keep_alive_handler()
            return
        self.timeout_keep_alive_task = self.loop.call_later(left_s, self.timeout_keep_alive_handler)

    def _start_timer(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_S, self._too_late)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _too_late(self) -> None:
        if not self.transport.is_closing():
            self.transport.abort()
