"""One connection: the head of a request must be short, and come soon; common requests go past ASGI.

The parser in C that uvicorn uses has a limit for neither; a request's body is the `app`'s business.
A short request is offered to `quick` first. Whatever that does not take on
goes uvicorn's way, as if nothing had been. A client sends the same head again and again: what the
parser made of one is kept, and the same bytes are not parsed twice.
"""

from __future__ import annotations

import asyncio
from functools import lru_cache, partial
from http import HTTPStatus
from typing import Any, NamedTuple

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from mlflow_pt_deploy.serving.protocol import Answer
from mlflow_pt_deploy.serving.quick import Quick
from mlflow_pt_deploy.serving.short import MOST_BYTES
from mlflow_pt_deploy.serving.ticket import Caller

HEAD_BYTES = 64 * 2**10
HEAD_S = 15.0
SHORT_S = 0.2
_KNOWN_HEADS = 1024
_KNOWN_BYTES = 1024
_GAP = b"\r\n\r\n"


class _Head(NamedTuple):
    """What a request's head says; its connection stays open."""

    url: bytes
    headers: list[tuple[bytes, bytes]]
    fields: dict[bytes, bytes]
    length: int


_known: dict[bytes, _Head] = {}
"""What was parsed before, by its bytes."""


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
        self._between = True  # whether all requests that began have come to their end
        self._came = b""  # what came last, if a request began with it

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
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
        head = _Head(self.url, self.headers, dict(self.headers), len(body))
        keep_alive = self.parser.should_keep_alive()
        if self._offer(head, body, keep_alive):
            self._short = None
            if keep_alive:
                self._keep(head, body)
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

    def _offer(self, head: _Head, body: bytes, keep_alive: bool) -> bool:
        """Whether `quick` takes a request on."""
        assert self._quick is not None
        turn, before = _Turn(keep_alive), self.cycle
        self.cycle = turn  # type: ignore[assignment]
        done = partial(self._done, turn, head, body)
        if self._quick.take(head.url, head.fields, body, turn.caller, done):
            return True
        self.cycle = before
        return False

    def _is_known(self, data: bytes) -> bool:
        """Take on a whole request whose head has been parsed before."""
        text, _, body = data.partition(_GAP)
        head = _known.get(text)
        if head is None or len(body) != head.length or self._quick is None:
            return False
        if not (self._quick.knows(head.url) and self._is_free() and self._offer(head, body, True)):
            return False
        self._unset_keepalive_if_required()
        self._close_head()
        return True

    def _keep(self, head: _Head, body: bytes) -> None:
        """Remember a head if it, its body and nothing else came in one piece."""
        text, _, rest = self._came.partition(_GAP)
        if (
            rest == body
            and len(text) <= _KNOWN_BYTES
            and head.fields.get(b"content-length") == b"%d" % len(body)
            and b"transfer-encoding" not in head.fields
        ):
            if len(_known) >= _KNOWN_HEADS:
                _known.clear()
            _known[text] = head

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

    def _done(self, turn: _Turn, head: _Head, body: bytes, result: Answer | None) -> None:
        """Send what `quick` answered; None: begin anew, from what was kept of the request."""
        if turn.disconnected or self.transport.is_closing():
            return
        if result is None:
            self._begin(turn, head, body)
            return
        assert result.version is not None
        start = _start_of_answer(
            result.status,
            turn.keep_alive,
            *self.server_state.default_headers,
            (b"content-type", result.content_type),
            result.version.header,
            *result.headers,
        )
        length = b"content-length: %d" % len(result.body)
        self.transport.write(b"".join([start, length, _GAP, result.body]))
        turn.response_complete = True
        if not turn.keep_alive:
            self.transport.close()
        self.on_response_complete()

    def _begin(self, turn: _Turn, head: _Head, body: bytes) -> None:
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


@lru_cache(maxsize=256)
def _start_of_answer(status: int, keep_alive: bool, *headers: tuple[bytes, bytes]) -> bytes:
    """Status line and headers; the same for a second, for then the date is another."""
    lines = [b"HTTP/1.1 %d %s" % (status, HTTPStatus(status).phrase.encode())]
    lines += [b"%s: %s" % header for header in headers]
    if not keep_alive:
        lines.append(b"connection: close")
    return b"\r\n".join([*lines, b""])
