"""One connection: the head of a request must be short, and come soon; common requests go past ASGI.

The parser in C that uvicorn uses has a limit for neither; a request's body is the `app`'s business.
A short request is offered to `quick` first. Whatever that does not take on
goes uvicorn's way, as if nothing had been.
"""

from __future__ import annotations

import asyncio
from functools import partial
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from mlflow_pt_deploy.serving.protocol import Answer
from mlflow_pt_deploy.serving.quick import MOST_BYTES, Quick
from mlflow_pt_deploy.serving.ticket import Caller

HEAD_BYTES = 64 * 2**10
HEAD_S = 15.0
SHORT_S = 0.2


class _Turn:
    """What uvicorn must see as the request under way while `quick` has it."""

    message_event = asyncio.Event()  # nobody waits for it

    def __init__(self, keep_alive: bool) -> None:
        self.keep_alive = keep_alive
        self.response_complete = False
        self.caller = Caller()

    @property
    def disconnected(self) -> bool:
        return self.caller.left

    @disconnected.setter
    def disconnected(self, gone: bool) -> None:
        self.caller.left = gone


class BoundedProtocol(HttpToolsProtocol):
    """Uvicorn's, with a limit on heads: `HEAD_BYTES`, and `HEAD_S` until one has come."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._head_open = True
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._quick: Quick | None = getattr(self.app, "quick", None)
        self._short: bytes | None = None  # the body of a request that `quick` may take
        self._short_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._short = None
        self._stop_short_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._short is not None and self._short_timer is None:
            # Many clients send a body apart from its head. Should its end not come soon, `app` has
            # the patience and the limits.
            self._short_timer = self.loop.call_later(SHORT_S, self._go_uvicorns_way)
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
        self._head_open = False
        self._head_bytes = 0
        self._stop_timer()
        if self._may_be_quick():
            self._short = b""
        else:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if self._short is None:
            super().on_body(body)
            return
        self._short += body
        if len(self._short) > MOST_BYTES:
            self._go_uvicorns_way()

    def on_message_complete(self) -> None:
        if self._short is None or self._quick is None:
            super().on_message_complete()
            return
        self._stop_short_timer()
        turn, before = _Turn(self.parser.should_keep_alive()), self.cycle
        self.cycle = turn  # type: ignore[assignment]
        done = partial(self._done, turn, self.scope, self.url, self._short)
        if self._quick.take(self.url, dict(self.headers), self._short, turn.caller, done):
            self._short = None
            return
        self.cycle = before
        if self._go_uvicorns_way():
            super().on_message_complete()

    def _may_be_quick(self) -> bool:
        busy = self.cycle is not None and not self.cycle.response_complete
        return (
            self._quick is not None
            and self.parser.get_method() == b"POST"
            and self._quick.knows(self.url)
            and self.parser.get_http_version() == "1.1"
            and not (busy or self.flow.write_paused or self.expect_100_continue)
            and not self.parser.should_upgrade()
            and len(self.connections) < (self.limit_concurrency or len(self.connections) + 1)
        )

    def _go_uvicorns_way(self) -> bool:
        """Begin the request as uvicorn would have done, unless the connection closes."""
        body, self._short = self._short, None
        self._stop_short_timer()
        if self.transport.is_closing():
            return False
        super().on_headers_complete()
        if body:
            super().on_body(body)
        return True

    def _done(
        self, turn: _Turn, scope: Any, url: bytes, body: bytes, result: Answer | None
    ) -> None:
        """Send what `quick` answered; None: begin anew, from what was kept of the request."""
        if turn.disconnected or self.transport.is_closing():
            return
        if result is None:
            self._begin(turn, scope, url, body)
            return
        assert result.version is not None
        status = b"HTTP/1.1 %d %s" % (result.status, HTTPStatus(result.status).phrase.encode())
        head = [(b"content-type", result.content_type), result.version.header, *result.headers]
        head.append((b"content-length", b"%d" % len(result.body)))
        if not turn.keep_alive:
            head.append((b"connection", b"close"))
        lines = [name + b": " + value for name, value in self.server_state.default_headers + head]
        text = b"\r\n".join([status, *lines, b"", result.body])
        self.transport.write(text)
        turn.response_complete = True
        if not turn.keep_alive:
            self.transport.close()
        self.on_response_complete()

    def _begin(self, turn: _Turn, scope: Any, url: bytes, body: bytes) -> None:
        scope.update(method="POST", path=url.decode(), raw_path=url, query_string=b"")
        cycle = RequestResponseCycle(
            scope=scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=self.access_log,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=False,
            keep_alive=turn.keep_alive,
            on_response=self.on_response_complete,
        )
        cycle.body += body
        cycle.more_body = False
        cycle.message_event.set()
        if self.cycle is turn:  # type: ignore[comparison-overlap]
            self.cycle = cycle
        self._start_asgi_task(cycle, self.app)

    def _start_timer(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_S, self._too_late)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_short_timer(self) -> None:
        if self._short_timer is not None:
            self._short_timer.cancel()
            self._short_timer = None

    def _too_late(self) -> None:
        if not self.transport.is_closing():
            self.transport.abort()
