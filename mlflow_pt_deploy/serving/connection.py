"""One connection: common requests go past ASGI, and past Python's reading where that is possible.

A short request is offered to `quick` first; whatever that does not take on goes uvicorn's way, as
if nothing had been. A connection on which the same heads come again is lent to the `front`.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from mlflow_pt_deploy.serving.batching.request import Caller
from mlflow_pt_deploy.serving.bounded import BoundedProtocol
from mlflow_pt_deploy.serving.front import Loan
from mlflow_pt_deploy.serving.heads import Head, keep, known, written
from mlflow_pt_deploy.serving.http.mlflow_protocol import Answer
from mlflow_pt_deploy.serving.quick import Quick
from mlflow_pt_deploy.serving.short import MOST_BYTES, looks_short

SHORT_S = 0.2
# A connection that seems idle comes back before it is closed, so that what is on its way is heard.
_LAST_LOOK_S = 0.05


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


class Connection(BoundedProtocol):
    """Uvicorn's, within its limits, but for the requests that `quick` takes on."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._quick: Quick | None = getattr(self.app, "quick", None)
        self._loan: Loan | None = None
        self._short: bytes | None = None  # the body of a request that `quick` may take
        self._short_timer: asyncio.TimerHandle | None = None
        self._between = True  # whether all requests that began have come to their end
        self._came = b""  # what came last, if a request began with it

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        front = getattr(self.app, "front", None)
        if front is not None and self.scheme == "http":
            self._loan = Loan(front, self, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._recall()
        self._short = None
        self._stop_short_timer()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        self._recall()
        super().shutdown()

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

    def lent_request(self, data: bytes, since: float) -> None:
        """A whole request came while the connection was lent.

        Args:
            data: Its head is one that the `Loan` was told.
            since: When it was read, by `time.perf_counter`.
        """
        if self.transport.is_closing():
            return
        head, body = known(data)
        if head is None or not self._take(head, body, True, since):
            self._recall()
            self.data_received(data)

    def given_back(self, data: bytes) -> None:
        """The connection is lent no more, and this was read on it last."""
        self._recall()
        if data and not self.transport.is_closing():
            self.data_received(data)

    def on_message_begin(self) -> None:
        self._between = False
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        if self._may_be_quick():
            self.close_head()
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
        head = Head(b"", self.url, self.headers, dict(self.headers), len(body))
        keep_alive = self.parser.should_keep_alive()
        if looks_short(head.fields, body) and self._offer(head, body, keep_alive):
            self._short = None
            if keep_alive:
                keep(self._came, head, body)
        elif self._go_uvicorns_way():
            super().on_message_complete()

    def rested_s(self) -> float:
        if self._loan is None or not self._loan.lent:
            return super().rested_s()
        self._rested_s = max(self._rested_s, self._loan.heard_s())
        rested_s = super().rested_s()
        if rested_s < self.timeout_keep_alive:
            return rested_s
        self._recall()
        return min(super().rested_s(), self.timeout_keep_alive - _LAST_LOOK_S)

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
        return not (self.busy or self.flow.write_paused) and (
            len(self.connections) < (self.limit_concurrency or len(self.connections) + 1)
        )

    def _offer(self, head: Head, body: bytes, keep_alive: bool) -> bool:
        """Whether `quick` refuses a request, or takes it on."""
        assert self._quick is not None
        refusal = self._quick.refuse(head.url, head.fields)
        if refusal is None:
            return self._take(head, body, keep_alive)
        self._send(refusal, keep_alive)
        return True

    def _take(self, head: Head, body: bytes, keep_alive: bool, since: float | None = None) -> bool:
        """Whether `quick` takes a request on, which came at `since`, or now."""
        assert self._quick is not None
        turn, before = _UnderWay(keep_alive), self.cycle
        self.cycle = turn  # type: ignore[assignment]
        done = partial(self._done, turn, head, body)
        if self._quick.take(head.url, head.fields, body, turn.caller, done, since):
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
        self.close_head()
        if self._loan is not None:
            self._loan.lend(head, self.busy)
        return True

    def _recall(self) -> None:
        if self._loan is not None and self._loan.lent:
            self._rested_s = max(self._rested_s, self._loan.recall())

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
            self._recall()
            self._begin(turn, head, body)
            return
        turn.response_complete = True
        self._send(result, turn.keep_alive)

    def _send(self, result: Answer, keep_alive: bool) -> None:
        data = written(result, keep_alive, self.server_state.default_headers)
        if self._loan is not None and self._loan.lent:
            data = self._loan.answer(data)
        if data:
            self._recall()
            self.transport.write(data)
        if not keep_alive:
            self._recall()
            self.transport.close()
        self.on_response_complete()

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

    def _stop_short_timer(self) -> None:
        if self._short_timer is not None:
            self._short_timer.cancel()
            self._short_timer = None
