"""One connection: the head of a request must be short, and come soon; common requests go past ASGI.

The parser in C that uvicorn uses has a limit for neither; a request's body is the `app`'s business.
A short request is offered to `quick` first. Whatever that does not take on
goes uvicorn's way, as if nothing had been.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from mlflow_pt_deploy.serving.heads import GAP, Head, keep, known, start_of_answer
from mlflow_pt_deploy.serving.protocol import Answer
from mlflow_pt_deploy.serving.quick import Quick
from mlflow_pt_deploy.serving.short import MOST_BYTES, looks_short
from mlflow_pt_deploy.serving.ticket import Caller

HEAD_BYTES = 64 * 2**10
HEAD_S = 15.0
SHORT_S = 0.2


class _UnderWay:
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
        self._between = True  # whether all requests that began have come to their end
        self._came = b""  # what came last, if a request began with it
        self._rested_s = 0.0  # since when nothing is under way, by the loop's clock

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self.scheme == "http":  # with this limit a TLS transport would never write again
            # What is written goes out at once, not when all that came in this turn has been read.
            transport.set_write_buffer_limits(high=0)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._short = None
        self._stop_short_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._between and self._is_known(data):
            return
        self._came = data if self._between else b""
        super().data_received(data)
        self._came = b""
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
        self._head_open, self._between = True, False
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._close_head()
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
        self._between = True
        if self._short is None:
            super().on_message_complete()
            return
        self._stop_short_timer()
        body = self._short
        head = Head(self.url, self.headers, dict(self.headers), len(body))
        keep_alive = self.parser.should_keep_alive()
        if looks_short(head.fields, body) and self._offer(head, body, keep_alive):
            self._short = None
            if keep_alive:
                keep(self._came, head, body)
        elif self._go_uvicorns_way():
            super().on_message_complete()

    def _may_be_quick(self) -> bool:
        return (
            self._quick is not None
            and self.parser.get_method() == b"POST"
            and self._quick.knows(self.url)
            and self.parser.get_http_version() == "1.1"
            and self._is_free()
            and not (self.expect_100_continue or self.parser.should_upgrade())
        )

    def _is_free(self) -> bool:
        """Whether nothing is under way here, and there is room for more."""
        busy = self.cycle is not None and not self.cycle.response_complete
        return not (busy or self.flow.write_paused) and (
            len(self.connections) < (self.limit_concurrency or len(self.connections) + 1)
        )

    def _offer(self, head: Head, body: bytes, keep_alive: bool) -> bool:
        """Whether `quick` refuses a request, or takes it on."""
        assert self._quick is not None
        refusal = self._quick.refuse(head.url, head.fields)
        if refusal is not None:
            self._send(refusal, keep_alive)
            return True
        turn, before = _UnderWay(keep_alive), self.cycle
        self.cycle = turn  # type: ignore[assignment]
        done = partial(self._done, turn, head, body)
        if self._quick.take(head.url, head.fields, body, turn.caller, done):
            return True
        self.cycle = before
        return False

    def _is_known(self, data: bytes) -> bool:
        """Take on a whole request whose head has been parsed before."""
        head, body = known(data)
        if head is None or self._quick is None:
            return False
        if not (self._quick.knows(head.url) and self._is_free() and self._offer(head, body, True)):
            return False
        self._close_head()
        return True

    def _close_head(self) -> None:
        self._head_open = False
        self._head_bytes = 0
        self._stop_timer()

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

    def _done(self, turn: _UnderWay, head: Head, body: bytes, result: Answer | None) -> None:
        """Send what `quick` answered; None: begin anew, from what was kept of the request."""
        if turn.disconnected or self.transport.is_closing():
            return
        if result is None:
            self._begin(turn, head, body)
            return
        turn.response_complete = True
        self._send(result, turn.keep_alive)

    def _send(self, result: Answer, keep_alive: bool) -> None:
        assert result.version is not None
        start = start_of_answer(
            result.status,
            keep_alive,
            *self.server_state.default_headers,
            (b"content-type", result.content_type),
            result.version.header,
            *result.headers,
        )
        length = b"content-length: %d" % len(result.body)
        self.transport.write(b"".join([start, length, GAP, result.body]))
        if not keep_alive:
            self.transport.close()
        self.on_response_complete()

    def on_response_complete(self) -> None:
        """Uvicorn's; but where its timer for an idle connection runs still, it runs on."""
        self._rested_s = self.loop.time()
        if self.pipeline or self.flow.read_paused or self.timeout_keep_alive_task is None:
            super().on_response_complete()
        else:
            self.server_state.total_requests += 1

    def timeout_keep_alive_handler(self) -> None:
        """Close the connection, unless something has come since the timer was set."""
        self.timeout_keep_alive_task = None
        if self.transport.is_closing():
            return
        busy = self.cycle is not None and not self.cycle.response_complete
        rested_s = 0.0 if busy else self.loop.time() - self._rested_s
        if rested_s >= self.timeout_keep_alive:
            super().timeout_keep_alive_handler()
            return
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive - rested_s, self.timeout_keep_alive_handler
        )

    def _begin(self, turn: _UnderWay, head: Head, body: bytes) -> None:
        scope: Any = {
            "type": "http",
            "asgi": {"version": self.asgi_version, "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "path": head.url.decode(),
            "raw_path": head.url,
            "query_string": b"",
            "root_path": self.root_path,
            "headers": head.headers,
            "server": self.server,
            "client": self.client,
            "scheme": self.scheme,
            "state": self.app_state.copy(),
        }
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
