"""Many callers, one model: bounded micro-batches without a thread of their own.

Leader and followers: a caller that finds the model idle computes at once; callers that come
meanwhile queue, and when the leader is done the oldest of them leads next and takes as many
queued rows as fit. Batches so grow with the load, and an idle model waits for nobody.

Knows neither MLflow nor HTTP, and nothing of what a token means.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mlflow_pt_deploy.errors import DeadlineError, OverloadedError, ServingError
from mlflow_pt_deploy.serving.options import Limits
from mlflow_pt_deploy.variants.base import Inputs, Logits, Predict

Encoded = Any
"""A row as a preprocessor's `encode` gave it."""

Collate = Callable[[Sequence[Encoded]], Inputs]
Tokens = Callable[[Encoded], int]

# A call costs about as much as this many tokens before it computes the first one (MiniLM-L6 on
# two cores, OpenVINO): padding below that is cheaper than a second call.
_CALL_TOKENS = 64
_PADDING_SHARE = 0.25


class _Shape(NamedTuple):
    """What decides whether rows go together: their number, the longest, tokens unpadded."""

    rows: int = 0
    longest: int = 0
    tokens: int = 0

    def plus(self, other: _Shape) -> _Shape:
        return _Shape(
            self.rows + other.rows,
            max(self.longest, other.longest),
            self.tokens + other.tokens,
        )

    def fits(self, limits: Limits) -> bool:
        padded = self.rows * self.longest
        return (
            self.rows <= limits.max_batch_rows
            and padded <= limits.max_batch_tokens
            and padded - self.tokens <= _CALL_TOKENS + _PADDING_SHARE * self.tokens
        )


class _Chunk(NamedTuple):
    """Rows of one request that are computed together."""

    indices: list[int]
    shape: _Shape


class _Row(NamedTuple):
    ticket: _Ticket
    at: int


class _Ticket:
    """One caller's request, from its arrival to its answer."""

    def __init__(
        self, rows: Sequence[Encoded], limits: Limits, tokens: Tokens, deadline: bool
    ) -> None:
        self.rows = rows
        self.chunks = _cut([tokens(row) for row in rows], limits)
        self.answers: list[Logits | None] = [None] * len(rows)
        self.missing = len(rows)
        self.error: Exception | None = None
        self.leads = False
        self.wake = threading.Event()
        seconds = limits.deadline_ms / 1000
        self.expires = time.monotonic() + seconds if deadline and seconds else None

    @property
    def done(self) -> bool:
        return self.error is not None or not self.missing

    def put(self, index: int, answer: Logits) -> None:
        self.answers[index] = answer
        self.missing -= 1

    def left_s(self) -> float | None:
        """Seconds until the deadline, never below 0; None without one."""
        return None if self.expires is None else max(0.0, self.expires - time.monotonic())

    def result(self) -> Logits:
        if self.error is not None:
            raise self.error
        return np.stack([answer for answer in self.answers if answer is not None])


class Batcher:
    """Gathers the rows of concurrent callers into batches of similar length.

    The oldest request is always in the next batch; younger ones join it where they add little
    padding. A request with many rows is cut into chunks and takes turns with the others. A batch
    that fails is halved until the row at fault is alone, so that only its request fails.

    Args:
        predict: The model; never called by two threads at once.
        collate: Puts encoded rows together to named arrays, batch first.
        limits: Sizes and times.
        tokens: What an encoded row costs.
    """

    def __init__(
        self,
        predict: Predict,
        collate: Collate,
        limits: Limits | None = None,
        tokens: Tokens = len,
    ) -> None:
        self.limits = limits or Limits()
        self._tokens = tokens
        self._predict = predict
        self._collate = collate
        self._lock = threading.Lock()
        self._arrived = threading.Condition(self._lock)
        self._queue: deque[_Ticket] = deque()
        self._queued_rows = 0
        self._led = False

    def submit(self, rows: Sequence[Encoded], *, bounded: bool = True) -> Logits:
        """Compute one request; blocks until it is answered.

        Args:
            rows: Encoded rows, e.g. the token ids of each, unpadded.
            bounded: False for batch scoring: no limit on the queue, and no deadline.

        Returns:
            float32 (rows, classes), in the order of `rows`.

        Raises:
            OverloadedError: The queue has no room for this many rows.
            DeadlineError: The request was not answered in time.
            Exception: Whatever the model raised on one of these rows.
        """
        if not rows:
            raise ServingError("a request of no rows cannot be computed; send at least one")
        ticket = _Ticket(rows, self.limits, self._tokens, deadline=bounded)
        self._enter(ticket, bounded)
        try:
            if not ticket.leads:
                self._follow(ticket)
            while ticket.leads and not ticket.done:
                self._step(ticket)
        finally:
            with self._lock:
                self._leave(ticket)
        return ticket.result()

    def _enter(self, ticket: _Ticket, bounded: bool) -> None:
        with self._lock:
            if bounded and self._queued_rows + len(ticket.rows) > self.limits.queue_rows:
                raise OverloadedError(
                    f"the queue has no room: {self._queued_rows} rows wait, {len(ticket.rows)} "
                    f"more came, queue_rows is {self.limits.queue_rows}. Try again later."
                )
            self._queue.append(ticket)
            self._queued_rows += len(ticket.rows)
            ticket.leads, self._led = not self._led, True
            self._arrived.notify()

    def _follow(self, ticket: _Ticket) -> None:
        """Sleep until answered or told to lead, or until the deadline."""
        if ticket.wake.wait(ticket.left_s()):
            return
        with self._lock:
            if not (ticket.done or ticket.leads):
                ticket.error = self._late()

    def _leave(self, ticket: _Ticket) -> None:
        """Forget the request and pass the lead on; on every way out, errors included."""
        self._withdraw(ticket)
        self._hand_over(ticket)

    def _withdraw(self, ticket: _Ticket) -> None:
        if ticket in self._queue:
            self._queue.remove(ticket)
            self._queued_rows -= sum(chunk.shape.rows for chunk in ticket.chunks)

    def _hand_over(self, ticket: _Ticket) -> None:
        if not ticket.leads:
            return
        ticket.leads = False
        self._led = bool(self._queue)
        if self._queue:
            self._queue[0].leads = True
            self._queue[0].wake.set()

    def _step(self, leader: _Ticket) -> None:
        """Compute one batch and hand out its answers."""
        with self._lock:
            self._wait_for_company()
            self._drop_expired()
            batch = self._take()
        try:
            self._compute(batch)
        except BaseException:
            for row in batch:
                row.ticket.error = row.ticket.error or ServingError("the server was interrupted")
            raise
        finally:
            with self._lock:
                finished = {row.ticket for row in batch if row.ticket.done} - {leader}
                for ticket in finished:
                    self._withdraw(ticket)
                if leader.done:  # first the next leader, so that the model is not kept idle
                    self._leave(leader)
                for ticket in finished:
                    ticket.wake.set()

    def _wait_for_company(self) -> None:
        until = time.monotonic() + self.limits.max_wait_ms / 1000
        while self._queued_rows < self.limits.max_batch_rows:
            left = until - time.monotonic()
            if left <= 0:
                return
            self._arrived.wait(left)

    def _drop_expired(self) -> None:
        for ticket in [ticket for ticket in self._queue if ticket.left_s() == 0]:
            ticket.error = self._late()
            self._withdraw(ticket)
            ticket.wake.set()

    def _take(self) -> list[_Row]:
        """The oldest request's next chunk, and what goes well with it."""
        if not self._queue:
            return []
        oldest = self._queue[0].chunks[-1].shape
        taken, shape = [self._queue[0]], oldest
        younger = sorted(
            list(self._queue)[1:], key=lambda t: abs(t.chunks[-1].shape.longest - oldest.longest)
        )
        for ticket in younger:
            wider = shape.plus(ticket.chunks[-1].shape)
            if wider.fits(self.limits):
                taken.append(ticket)
                shape = wider
        self._queued_rows -= shape.rows
        batch = [_Row(ticket, at) for ticket in taken for at in ticket.chunks.pop().indices]
        waiting = [ticket for ticket in self._queue if ticket not in taken]
        self._queue = deque(waiting + [ticket for ticket in taken if ticket.chunks])
        return batch

    def _compute(self, batch: list[_Row]) -> None:
        batch = [row for row in batch if row.ticket.error is None]
        if not batch:
            return
        try:
            logits = self._predict(self._collate([row.ticket.rows[row.at] for row in batch]))
            if len(logits) != len(batch):
                raise ServingError(f"the model answered {len(logits)} of {len(batch)} rows")
        except Exception as error:
            if len(batch) == 1:
                batch[0].ticket.error = error
                return
            middle = len(batch) // 2
            self._compute(batch[:middle])
            self._compute(batch[middle:])
            return
        for row, answer in zip(batch, logits, strict=True):
            row.ticket.put(row.at, answer)

    def _late(self) -> DeadlineError:
        return DeadlineError(
            f"not computed within {self.limits.deadline_ms:g} ms (deadline_ms). Try again later, "
            "or send fewer rows."
        )


def _cut(lengths: Sequence[int], limits: Limits) -> list[_Chunk]:
    """Chunks of rows of similar length, each within the limits, the longest last."""
    chunks: list[_Chunk] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        length = lengths[index]
        alone = _Shape(1, length, length)
        wider = chunks[-1].shape.plus(alone) if chunks else alone
        if chunks and wider.fits(limits):
            chunks[-1].indices.append(index)
            chunks[-1] = chunks[-1]._replace(shape=wider)
        else:
            chunks.append(_Chunk([index], alone))
    return chunks
