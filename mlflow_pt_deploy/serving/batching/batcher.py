"""Many callers, one model: bounded micro-batches.

A caller that finds the model idle computes at once, in his own thread (`Batcher.submit`) or, where
he must not wait, as an event loop, in one of the batcher's (`Batcher.start`). Callers that come
meanwhile queue; whoever computes takes as many queued rows as fit next, until there are none, or
until he has his own answers: then a thread of the batcher goes on. Batches so grow with the load,
and an idle model waits for nobody.

Knows neither MLflow nor HTTP, and nothing of what a token means.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Hashable, Sequence

from mlflow_pt_deploy.errors import DeadlineError, OverloadedError, ServingError
from mlflow_pt_deploy.runtimes.base import Logits, Predict
from mlflow_pt_deploy.serving.batching.concurrency import Workers
from mlflow_pt_deploy.serving.batching.executor import Answers, Calls, Collate, Tokens
from mlflow_pt_deploy.serving.batching.request import Caller, Encoded, Row, Ticket, cut
from mlflow_pt_deploy.serving.batching.request_queue import Batch, Queue
from mlflow_pt_deploy.serving.model.options import Limits

Done = Callable[[Ticket], None]

# Nobody is let in whom those before him in the queue would keep waiting for longer than this share
# of the time that he has: the batch that is being computed, and his own, take about as long again.
_PATIENCE = 1 / 3
# The same where threads compute batches of their own: of like lengths, so that whose length is rare
# waits for longer than most.
_STREAM_PATIENCE = 1 / 4
# Rows in a batch of one thread's: more gain little, and those who come meanwhile wait for longer.
_STREAM_ROWS = 16

_NO_THREAD = (
    "the system gives the server no thread to compute with. Try again later; if this lasts, raise "
    "its limit of threads (ulimit -u, or the container's)."
)


class Batcher:
    """Gathers the rows of concurrent callers into batches of similar length.

    The oldest request is always in the next batch; younger ones join it where they add little
    padding. A request with many rows is cut into chunks and takes turns with the others. A row
    that is in the batch already, or is being computed, is not computed again. A batch that fails
    is halved until the rows at fault are alone, so that only the requests that hold them fail: one
    bad row of n costs about 2 log2(n) more calls, and a model that fails on all 2 n - 2.

    Args:
        predict: The model; called by one thread at a time.
        collate: Puts encoded rows together to named arrays, batch first.
        limits: Sizes and times.
        tokens: What an encoded row costs.
        pads: Whether a row costs as much as the longest beside it.

    Attributes:
        calls: The model, and what it has cost.
        workers: Who computes; one, or as many as `spread` is told.
    """

    def __init__(
        self,
        predict: Predict,
        collate: Collate,
        limits: Limits | None = None,
        tokens: Tokens = len,
        pads: bool = True,
    ) -> None:
        self.limits = limits or Limits()
        self.calls = Calls(predict, collate, tokens, pads)
        self._lock = threading.Lock()
        self._arrived = threading.Condition(self._lock)
        self.workers = Workers()
        self._queue = Queue()
        self._patience = _PATIENCE
        self._most_rows = self.limits.max_batch_rows
        self._computing: list[Batch] = []

    @property
    def queued_rows(self) -> int:
        """Rows that wait, those in the model left out."""
        return self._queue.rows

    @property
    def row_s(self) -> float:
        """Seconds that a row by itself has cost of late; 0 before the first."""
        return self.calls.expected_s(1, 1)

    @property
    def wait_s(self) -> float:
        """Seconds that a request would have to wait now."""
        return self.calls.expected_s(self._queue.rows, self._most_rows) / self.workers.streams

    def spread(self, single: Predict, streams: int) -> None:
        """From here on compute several batches at a time, each by one thread.

        So no thread waits for the others at a batch's end. On two cores of a Xeon, with texts of 6
        to 62 tokens, the median of 1,400 requests/s was 35 to 53 % lower than where two threads
        share each batch, and 16 to 27 % more were answered in time where too many came.

        Args:
            single: Computes a batch; may be called by several threads at once, and while the
                model itself computes.
            streams: How many.
        """
        with self._lock:
            self.workers.spread(streams)
            self._patience = _STREAM_PATIENCE
            self._most_rows = min(self.limits.max_batch_rows, _STREAM_ROWS)
            self.calls.spread(single)

    def submit(
        self,
        rows: Sequence[Encoded],
        *,
        keys: Sequence[Hashable] | None = None,
        bounded: bool = True,
        caller: Caller | None = None,
    ) -> Logits:
        """Compute one request; blocks until it is answered.

        Args:
            rows: Encoded rows, e.g. the token ids of each, unpadded.
            keys: What makes rows the same, one a row; None: all are different.
            bounded: False for batch scoring: no limit on the queue, and no deadline of ours.
            caller: Who waits; may have a deadline of his own, and may leave.

        Returns:
            float32 (rows, classes), in the order of `rows`.

        Raises:
            OverloadedError: The queue has no room for this many rows, or is so long that the
                deadline would most likely be missed.
            DeadlineError: The request was not answered in time.
            Exception: Whatever the model raised on one of these rows.
        """
        ticket = Ticket(rows, keys, self.limits, bounded, caller)
        ticket.wake = event = threading.Event()
        works = self._line_up(ticket, bounded)
        try:
            if works:
                self._work(ticket)
            if not event.wait(ticket.left_s()):
                with self._lock:
                    if not ticket.done:
                        ticket.error = self.late()
        finally:
            with self._lock:
                self._queue.withdraw(ticket)
        return ticket.result()

    def start(
        self,
        rows: Sequence[Encoded],
        done: Done,
        *,
        keys: Sequence[Hashable] | None = None,
        caller: Caller | None = None,
    ) -> Ticket:
        """Compute one request while the caller goes on.

        Args:
            rows: As for `submit`.
            done: Called once with the ticket, when it has its answers or its error; by another
                thread and with the batcher locked, so it must be brief and must not call back.
            keys: As for `submit`.
            caller: As for `submit`. A request in the queue is dropped after its deadline, one that
                is being computed is not: whoever waits has to look at the clock.

        Raises:
            OverloadedError: As for `submit`; or the system gives no thread to compute with.
        """
        ticket = Ticket(rows, keys, self.limits, True, caller)
        ticket.wake = _Call(ticket, done)
        if self._line_up(ticket, True) and not self.workers.lend(self._work):
            with self._lock:
                self.workers.dismiss()
                if not (self.workers.busy or ticket.done):  # else others take it, or have
                    self._queue.withdraw(ticket)
                    raise OverloadedError(_NO_THREAD)
        return ticket

    def at_once(
        self, rows: Sequence[Encoded], *, keys: Sequence[Hashable] | None = None
    ) -> Logits | None:
        """Compute a few rows here and now, as one batch.

        Args:
            rows, keys: As for `submit`.

        Returns:
            As `submit`; None: the model is busy, or the rows do not go into one batch.

        Raises:
            Exception: Whatever the model raised on any of the rows.
        """
        most = self.limits.max_batch_rows
        if not self.calls.shape(rows).fits(self.limits, self.calls.slack, most):
            return None
        with self._lock:
            if self.workers.busy:
                return None
            self.workers.take_on()
        try:
            keys = keys or range(len(rows))
            distinct = dict(zip(keys, rows, strict=True))
            logits = self.calls.logits(list(distinct.values()))
            if len(distinct) == len(rows):
                return logits
            order = {key: at for at, key in enumerate(distinct)}
            return logits[[order[key] for key in keys]]
        finally:
            self._leave()

    def crowded(self, left_s: float, before_s: float = 0.0) -> bool:
        """Whether a request would most likely come too late.

        Args:
            left_s: Seconds until its deadline.
            before_s: Seconds that it has to wait for before it could line up here.
        """
        return before_s + self.wait_s > self._patience * left_s

    def spare_rows(self, left_s: float) -> float:
        """How many more rows could line up until it would be `crowded`; 0 where it is."""
        if self.crowded(left_s):
            return 0
        time_s = self._patience * left_s * self.workers.streams
        rows = self.calls.expected_rows(time_s, self._most_rows)
        return max(1, rows - self._queue.rows)

    def late(self) -> DeadlineError:
        """What is told to a request whose deadline has passed."""
        return DeadlineError(
            f"not computed within {self.limits.deadline_ms:g} ms (deadline_ms) or the request's "
            "own deadline. Try again later, or send fewer rows."
        )

    def _line_up(self, ticket: Ticket, bounded: bool) -> bool:
        """Take a ticket's rows in; whether the caller has to see to it that they are computed."""
        if not ticket.rows:
            raise ServingError("a request of no rows cannot be computed; send at least one")
        lengths = self.calls.lengths(ticket.rows)
        most = self._share(len(lengths))
        ticket.chunks = cut(lengths, self._join(ticket), self.limits, self.calls.slack, most)
        return self._enter(ticket, bounded)

    def _share(self, rows: int) -> int:
        """Of so many rows as many as one batch may have, so that there is one for each stream."""
        return min(self._most_rows, math.ceil(rows / self.workers.streams))

    def _join(self, ticket: Ticket) -> list[int]:
        """Wait for rows that are being computed already; returns the indices of all others."""
        others = []
        with self._lock:
            if not self._computing:
                return list(range(len(ticket.rows)))
            for at, key in enumerate(ticket.keys):
                for batch in self._computing:
                    if key in batch:
                        batch[key].append(Row(ticket, at))
                        break
                else:
                    others.append(at)
        return others

    def _enter(self, ticket: Ticket, bounded: bool) -> bool:
        rows = ticket.waiting_rows
        if not rows:
            return False
        with self._lock:
            if bounded and self._queue.rows + rows > self.limits.queue_rows:
                raise OverloadedError(
                    f"the queue has no room: {self._queue.rows} rows wait, {rows} "
                    f"more came, queue_rows is {self.limits.queue_rows}. Try again later."
                )
            left_s = ticket.left_s() if bounded else None
            if left_s is not None and self.crowded(left_s):
                raise OverloadedError(
                    f"a request would wait for about {1000 * self.wait_s:.0f} ms, too long for its "
                    f"deadline in {1000 * left_s:.0f} ms. Try again later."
                )
            self._queue.push(ticket)
            self._arrived.notify()
            return self.workers.take_on()

    def _work(self, ticket: Ticket | None = None) -> None:
        """Compute until nobody waits; with a ticket, until that is done."""
        try:
            while not (ticket and ticket.done) and self._step():
                pass
        finally:
            self._leave()

    def _leave(self) -> None:
        """Compute no more; on every way out, errors included."""
        with self._lock:
            if not (self._queue and self.workers.lend(self._work)):
                self.workers.dismiss()

    def _step(self) -> bool:
        """Compute one batch and hand out its answers; whether there was one."""
        with self._lock:
            self._wait_for_company()
            self._drop_pointless()
            most = self._share(self._queue.rows)
            batch = self._queue.take(self.limits, self.calls.slack, most)
            if not batch:
                return False
            alone = self.workers.alone and not self._queue
            if self._queue and self.workers.take_on() and not self.workers.lend(self._work):
                self.workers.dismiss()
            self._computing.append(batch)
        answers: Answers = {}
        try:
            rows = [(key, rows[0].encoded) for key, rows in batch.items()]
            self.calls.answer(rows, answers, alone)
        finally:
            with self._lock:
                self._computing = [other for other in self._computing if other is not batch]
                self._hand_out(batch, answers)
        return True

    def _hand_out(self, batch: Batch, answers: Answers) -> None:
        for key, rows in batch.items():
            for row in rows:
                row.ticket.put(row.at, answers[key] if key in answers else _interrupted())
        for ticket in {row.ticket for rows in batch.values() for row in rows}:
            if ticket.done:
                self._queue.withdraw(ticket)
                ticket.wake.set()

    def _wait_for_company(self) -> None:
        until = time.monotonic() + self.limits.max_wait_ms / 1000
        while self._queue.rows < self.limits.max_batch_rows:
            left = until - time.monotonic()
            if left <= 0:
                return
            self._arrived.wait(left)

    def _drop_pointless(self) -> None:
        for ticket in self._queue.withdraw_pointless():
            ticket.error = self.late()
            ticket.wake.set()


class _Call:
    """Wakes a caller that does not sleep: tells it the end, once."""

    def __init__(self, ticket: Ticket, done: Done) -> None:
        self._ticket = ticket
        self._done: Done | None = done

    def set(self) -> None:
        if self._done is not None:
            done, self._done = self._done, None
            done(self._ticket)


def _interrupted() -> ServingError:
    return ServingError("the server was interrupted")
