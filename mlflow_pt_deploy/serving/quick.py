"""The common request without a thread of its own, and many at a time.

Requests that come in one turn of the event loop are read together. Where to hand rows to a thread
costs more than to score them, the model is asked right here, all rows in one batch; else the
batcher's thread computes them and reports back. What is not the common request goes the
long way and is answered there; both ways give the same answers and the same errors.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import numpy as np

from mlflow_pt_deploy.runtimes.base import Logits
from mlflow_pt_deploy.serving.batching.request import Caller, Encoded, Ticket
from mlflow_pt_deploy.serving.crowd import Admission, Crowds, Told
from mlflow_pt_deploy.serving.http.auth import Guard
from mlflow_pt_deploy.serving.http.mlflow_protocol import (
    DEADLINE_HEADER,
    LEFT,
    Answer,
    failed,
    time_left,
)
from mlflow_pt_deploy.serving.lifecycle.served_model import Slot
from mlflow_pt_deploy.serving.model.loaded_model import Version
from mlflow_pt_deploy.serving.model.pyfunc import MOST_AT_ONCE
from mlflow_pt_deploy.serving.short import read_short
from mlflow_pt_deploy.serving.turn import Turn

Done = Callable[[Answer | None], None]
"""Told the answer; None: nothing was scored, go the long way."""


@dataclass(slots=True, eq=False)
class _Asked:
    """A request under way; `done` is None once it is answered."""

    path: str
    slot: Slot
    version: Version
    rows: list[str]
    top_k: int
    since: float
    caller: Caller
    parents: tuple[bytes]
    done: Done | None
    timer: asyncio.TimerHandle | None = None


class Quick:
    """Answers short requests of texts.

    Args:
        scored: The slot behind each path.
        guard: Who may score.
        told: Told of each answer.
        in_flight: How many requests are under way, by the slot's name; kept up to date.
    """

    def __init__(
        self,
        scored: Mapping[str, Slot],
        guard: Guard,
        told: Told,
        in_flight: MutableMapping[str, int],
    ) -> None:
        self._scored = {path.encode(): (path, slot) for path, slot in scored.items()}
        self._guard = guard
        self._told = told
        self._in_flight = in_flight
        self._asked: list[_Asked] = []
        self._turn = Turn()
        self._crowds = Crowds(self._turn, told)
        self._finished: deque[tuple[_Asked, Ticket]] = deque()
        self._collecting = False
        self._changed: Callable[[], None] = lambda: None

    def listen(self, changed: Callable[[], None]) -> None:
        """Have somebody told whenever `room` may have changed."""
        self._changed = changed

    def room(self, path: bytes, deadline: bytes | None) -> Admission | None:
        """How many requests may wait outside; see `Crowds.room`.

        Args:
            path: One that it knows.
            deadline: The header of these requests, if they have it.
        """
        return self._crowds.room(self._scored[path][1], deadline, len(self._asked))

    @property
    def full(self) -> bool:
        """Whether nothing that comes now could be begun, whichever model it is for."""
        return all(
            (version := slot.current) is not None and version.pyfunc.full
            for _, slot in self._scored.values()
        )

    def tell_refused(self, path: bytes, number: int) -> None:
        """So many were refused outside."""
        self._crowds.tell(*self._scored[path], number)

    def knows(self, path: bytes) -> bool:
        """Whether a request to this path may be a common one."""
        return path in self._scored

    def refuse(self, path: bytes, headers: Mapping[bytes, bytes]) -> Answer | None:
        """Refuse a request that would come too late, before it is read.

        Args:
            path: One that it knows.
            headers: Of the request, names in lower case.

        Returns:
            The refusal, of which it tells; None: the request may be taken on.
        """
        if not self._guard.may_score(headers.get(b"authorization")):
            return None
        refusal = self._crowds.refuse(*self._scored[path], headers, len(self._asked))
        if refusal is not None:
            self._open_turn()
        return refusal

    def take(
        self,
        path: bytes,
        headers: Mapping[bytes, bytes],
        body: bytes,
        caller: Caller,
        done: Done,
        since: float | None = None,
    ) -> bool:
        """Take a request on, or say that it must go the long way.

        Args:
            path: One that it knows.
            headers: Of the request, names in lower case.
            body: The whole of it, of a request that `looks_short`.
            caller: Who asks; says so when he leaves.
            done: Called once, in a later turn of the loop, if this returns True.
            since: When it came, by `time.perf_counter`; None: now.
        """
        route, slot = self._scored[path]
        version = slot.current
        if version is None or version.pyfunc.loaded.preprocessor.column != "text":
            return False
        if not self._guard.may_score(headers.get(b"authorization")):
            return False
        self._open_turn()
        now = time.perf_counter()
        since = since or now
        found = read_short(body, len(version.pyfunc.loaded.labels))
        if found is None:
            return False
        slot.used = since
        left_s = time_left(version, headers.get(DEADLINE_HEADER))
        caller.expires = None if left_s is None else time.monotonic() - (now - since) + left_s
        parents = (headers.get(b"traceparent", b""),)
        self._asked.append(_Asked(route, slot, version, *found, since, caller, parents, done))
        self._in_flight[slot.name] += 1
        return True

    def begin_turn(self) -> bool:
        """Take on from here what is answered together; whoever begins has to end it.

        Returns:
            False: one has begun already, and will be ended by him who did.
        """
        if self._turn.open:
            return False
        self._turn.begin()
        return True

    def end_turn(self) -> None:
        """Answer what was taken on, at most `MOST_AT_ONCE` rows of it; the rest is a new turn."""
        asked = self._first()
        try:
            now = time.monotonic()
            for request in asked:
                if request.caller.left or now >= (request.caller.expires or math.inf):
                    self._late(request)
            self._score([request for request in asked if request.done is not None])
        finally:
            self._crowds.disperse(len(asked))
            if self._asked:
                self._open_turn()
            self._changed()

    def _open_turn(self) -> None:
        """What comes in this turn of the loop is answered together."""
        if self.begin_turn():
            asyncio.get_running_loop().call_soon(self.end_turn)

    def _first(self) -> list[_Asked]:
        """Those whose turn it is; the others wait for the next."""
        rows = list(accumulate(len(request.rows) for request in self._asked))
        count = max(1, bisect_right(rows, MOST_AT_ONCE))
        asked, self._asked = self._asked[:count], self._asked[count:]
        return asked

    def _score(self, asked: Sequence[_Asked]) -> None:
        for version, requests in _by_version(asked):
            pyfunc, rows = version.pyfunc, sum(len(request.rows) for request in requests)
            if pyfunc.glances and rows <= MOST_AT_ONCE:
                self._glance(version, requests)
            elif pyfunc.brisk(rows):
                try:
                    logits = pyfunc.score([row for request in requests for row in request.rows])
                    self._encode(version, requests, logits)
                except Exception:  # found again, told and logged on the long way
                    for request in requests:
                        self._answer(request, None)
            else:
                self._start(version, requests, self._encoded(version, requests))

    def _glance(self, version: Version, requests: Sequence[_Asked]) -> None:
        """Answer what a cascade's fast model is sure of; the rest is the batcher's."""
        encoded = self._encoded(version, requests)
        if not encoded:
            return
        try:
            logits, unsure = version.pyfunc.glance(encoded)
        except Exception:  # found again, told and logged in the batcher's thread
            self._start(version, requests, encoded)
            return
        sure: list[_Asked] = []
        answers: list[Logits] = []
        others: list[_Asked] = []
        rest: list[Encoded] = []
        at = 0
        for request in requests:
            mine, at = slice(at, at + len(request.rows)), at + len(request.rows)
            if unsure[mine].any():
                others.append(request)
                rest += encoded[mine]
            else:
                sure.append(request)
                answers.append(logits[mine])
        if sure:
            self._encode_all(version, sure, answers)
        self._start(version, others, rest)

    def _encoded(self, version: Version, requests: Sequence[_Asked]) -> list[Encoded]:
        """The rows of requests, one after the other; none where one of them cannot be read."""
        rows = [row for request in requests for row in request.rows]
        try:
            return list(version.pyfunc.loaded.preprocessor.encode(rows))
        except Exception:  # the long way says which row
            for request in requests:
                self._answer(request, None)
            return []

    def _start(
        self, version: Version, requests: Sequence[_Asked], encoded: Sequence[Encoded]
    ) -> None:
        """Hand rows to the batcher's thread."""
        batcher, loop, at = version.pyfunc.batcher, asyncio.get_running_loop(), 0
        for request in requests if encoded else ():
            rows, at = encoded[at : at + len(request.rows)], at + len(request.rows)
            computed = partial(self._computed, loop, request)
            try:
                ticket = batcher.start(rows, computed, keys=request.rows, caller=request.caller)
            except Exception as error:
                self._answer(request, failed(version, error))
                continue
            left_s = ticket.left_s()
            if left_s is not None:
                request.timer = loop.call_later(left_s, self._late, request)

    def _computed(self, loop: asyncio.AbstractEventLoop, request: _Asked, ticket: Ticket) -> None:
        """Called by the batcher's thread: the loop shall look at what has been finished."""
        self._finished.append((request, ticket))
        if not self._collecting:
            self._collecting = True
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(self._collect)

    def _collect(self) -> None:
        self._collecting = False  # first: what is finished from here on asks for another look
        tickets: dict[_Asked, Ticket] = {}
        while self._finished:
            request, ticket = self._finished.popleft()
            if ticket.error is None:
                tickets[request] = ticket
            else:
                self._answer(request, failed(request.version, ticket.error))
        for version, requests in _by_version(tickets):
            self._encode_all(version, requests, [tickets[request].result() for request in requests])
        self._changed()

    def _encode_all(
        self, version: Version, requests: Sequence[_Asked], logits: Sequence[Logits]
    ) -> None:
        """Answer requests, also where one of them holds NaN."""
        try:
            self._encode(version, requests, np.concatenate(logits))
        except Exception as error:
            if len(requests) == 1:
                self._answer(requests[0], failed(version, error))
                return
            for request, mine in zip(requests, logits, strict=True):
                self._encode_all(version, [request], [mine])

    def _encode(self, version: Version, requests: Sequence[_Asked], logits: Logits) -> None:
        """Answer requests from the logits of their rows, one after the other."""
        best = version.pyfunc.labels.write(logits)
        at = 0
        for request in requests:
            mine, at = slice(at, at + len(request.rows)), at + len(request.rows)
            if request.top_k == 1:
                text = ", ".join(best[mine])
            else:
                text = json.dumps(version.pyfunc.labels.read(logits[mine], request.top_k))[1:-1]
            body = f'{{"predictions": [{text}]}}'.encode()
            self._answer(request, Answer(200, body, version=version))

    def _late(self, request: _Asked) -> None:
        error = request.version.pyfunc.batcher.late()
        self._answer(request, failed(request.version, error))
        request.caller.left = True  # so that the batcher drops what it has not begun

    def _answer(self, request: _Asked, result: Answer | None) -> None:
        """Answer once; None: begin anew, the long way."""
        done, request.done = request.done, None
        if done is None:
            return
        if request.timer is not None:
            request.timer.cancel()
        self._in_flight[request.slot.name] -= 1
        if result is not None:
            told = LEFT if request.caller.left else result
            seconds = time.perf_counter() - request.since
            self._told(request.slot, request.path, told, seconds, request.parents)
        done(result)


def _by_version(asked: Iterable[_Asked]) -> list[tuple[Version, list[_Asked]]]:
    """Requests by the version that shall answer them, in order."""
    found: dict[int, tuple[Version, list[_Asked]]] = {}
    for request in asked:
        found.setdefault(id(request.version), (request.version, []))[1].append(request)
    return list(found.values())
