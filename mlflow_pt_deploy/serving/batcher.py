"""Many callers, one model: bounded micro-batches.

Leader and followers: a caller that finds the model idle computes at once; callers that come
meanwhile queue, and when the leader is done the oldest of them leads next and takes as many
queued rows as fit. Batches so grow with the load, and an idle model waits for nobody. A caller
with a thread of its own (`Batcher.submit`) leads in it; for one that must not wait, as an event
loop (`Batcher.start`), the batcher has one thread.

Knows neither MLflow nor HTTP, and nothing of what a token means.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor

from mlflow_pt_deploy.errors import DeadlineError, OverloadedError, ServingError
from mlflow_pt_deploy.serving.calls import Answers, Calls, Collate, Tokens
from mlflow_pt_deploy.serving.options import Limits
from mlflow_pt_deploy.serving.queue import Batch, Queue
from mlflow_pt_deploy.serving.ticket import Caller, Encoded, Row, Ticket, cut
from mlflow_pt_deploy.variants.base import Logits, Predict

Done = Callable[[Ticket], None]

# Nobody is let in whom those before him in the queue would keep waiting for longer than this share
# of the time that he has: the batch that is being computed, and his own, take about as long again.
_PATIENCE = 1 / 3


class Batcher:
    """Gathers the rows of concurrent callers into batches of similar length.

    The oldest request is always in the next batch; younger ones join it where they add little
    padding. A request with many rows is cut into chunks and takes turns with the others. A row
    that is in the batch already, or is being computed, is not computed again. A batch that fails
    is halved until the rows at fault are alone, so that only the requests that hold them fail: one
    bad row of n costs about 2 log2(n) more calls, and a model that fails on all 2 n - 2.

    Args:
        predict: The model; never called by two threads at once.
        collate: Puts encoded rows together to named arrays, batch first.
        limits: Sizes and times.
        tokens: What an encoded row costs.
        pads: Whether a row costs as much as the longest beside it.

    Attributes:
        calls: The model, and what it has cost.
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
        self._queue = Queue()
        self._led = False
        self._computing: Batch = {}
        self._lender: ThreadPoolExecutor | None = None

    @property
    def queued_rows(self) -> int:
        """Rows that wait, those in the model left out."""
        return self._queue.rows

    @property
    def busy(self) -> bool:
        """Whether somebody computes or waits."""
        return self._led

    @property
    def row_s(self) -> float:
        """Seconds that a row by itself has cost of late; 0 before the first."""
        return self.calls.expected_s(1, 1)

    @property
    def wait_s(self) -> float:
        """Seconds that a request would have to wait now."""
        return self.calls.expected_s(self._queue.rows, self.limits.max_batch_rows)

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
        self._line_up(ticket, bounded)
        try:
            if not ticket.leads:
                self._follow(ticket, event)
            while ticket.leads and not ticket.done:
                self._step(ticket)
        finally:
            with self._lock:
                self._leave(ticket)
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
            OverloadedError: As for `submit`.
        """
        ticket = Ticket(rows, keys, self.limits, True, caller)
        ticket.wake = _Call(ticket, self._lend, done)
        if self._line_up(ticket, True):
            self._lend(ticket)
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
        if not self.calls.shape(rows).fits(self.limits, self.calls.slack):
            return None
        with self._lock:
            if self._led:
                return None
            self._led = True
        try:
            keys = keys or range(len(rows))
            distinct = dict(zip(keys, rows, strict=True))
            logits = self.calls.logits(list(distinct.values()))
            if len(distinct) == len(rows):
                return logits
            order = {key: at for at, key in enumerate(distinct)}
            return logits[[order[key] for key in keys]]
        finally:
            with self._lock:
                self._pass_on()

    def crowded(self, left_s: float, before_s: float = 0.0) -> bool:
        """Whether a request would most likely come too late.

        Args:
            left_s: Seconds until its deadline.
            before_s: Seconds that it has to wait for before it could line up here.
        """
        return before_s + self.wait_s > _PATIENCE * left_s

    def spare_rows(self, left_s: float) -> float:
        """How many more rows could line up until it would be `crowded`; 0 where it is."""
        if self.crowded(left_s):
            return 0
        rows = self.calls.expected_rows(_PATIENCE * left_s, self.limits.max_batch_rows)
        return max(1, rows - self._queue.rows)

    def late(self) -> DeadlineError:
        """What is told to a request whose deadline has passed."""
        return DeadlineError(
            f"not computed within {self.limits.deadline_ms:g} ms (deadline_ms) or the request's "
            "own deadline. Try again later, or send fewer rows."
        )

    def _lend(self, ticket: Ticket) -> None:
        """Let the batcher's own thread lead for a ticket."""
        if self._lender is None:
            self._lender = ThreadPoolExecutor(1, thread_name_prefix="batcher")
        self._lender.submit(self._lead, ticket)

    def _lead(self, ticket: Ticket) -> None:
        try:
            while ticket.leads and not ticket.done:
                self._step(ticket)
        finally:
            with self._lock:
                self._leave(ticket)
                if not ticket.done:
                    ticket.error = _interrupted()
                ticket.wake.set()

    def _line_up(self, ticket: Ticket, bounded: bool) -> bool:
        """Take a ticket's rows in; whether it has to lead at once."""
        if not ticket.rows:
            raise ServingError("a request of no rows cannot be computed; send at least one")
        lengths = self.calls.lengths(ticket.rows)
        ticket.chunks = cut(lengths, self._join(ticket), self.limits, self.calls.slack)
        return self._enter(ticket, bounded)

    def _join(self, ticket: Ticket) -> list[int]:
        """Wait for rows that are being computed already; returns the indices of all others."""
        others = []
        with self._lock:
            for at, key in enumerate(ticket.keys if self._computing else ()):
                if key in self._computing:
                    self._computing[key].append(Row(ticket, at))
                else:
                    others.append(at)
            return others if self._computing else list(range(len(ticket.rows)))

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
            ticket.leads = at_once = not self._led
            self._led = True
            self._arrived.notify()
        return at_once

    def _follow(self, ticket: Ticket, event: threading.Event) -> None:
        """Sleep until answered or told to lead, or until the deadline."""
        if event.wait(ticket.left_s()):
            return
        with self._lock:
            if not (ticket.done or ticket.leads):
                ticket.error = self.late()

    def _leave(self, ticket: Ticket) -> None:
        """Forget the request and pass the lead on; on every way out, errors included."""
        self._queue.withdraw(ticket)
        self._hand_over(ticket)

    def _hand_over(self, ticket: Ticket) -> None:
        if ticket.leads:
            ticket.leads = False
            self._pass_on()

    def _pass_on(self) -> None:
        """Let the oldest in the queue lead, if there is any."""
        self._led = bool(self._queue)
        if self._queue:
            self._queue.oldest.leads = True
            self._queue.oldest.wake.set()

    def _step(self, leader: Ticket) -> None:
        """Compute one batch and hand out its answers."""
        with self._lock:
            self._wait_for_company()
            self._drop_pointless()
            batch = self._computing = self._queue.take(self.limits, self.calls.slack)
        answers: Answers = {}
        try:
            if batch:
                self.calls.answer([(key, rows[0].encoded) for key, rows in batch.items()], answers)
        finally:
            with self._lock:
                self._computing = {}
                self._hand_out(batch, answers, leader)

    def _hand_out(self, batch: Batch, answers: Answers, leader: Ticket) -> None:
        for key, rows in batch.items():
            for row in rows:
                row.ticket.put(row.at, answers[key] if key in answers else _interrupted())
        finished = {row.ticket for rows in batch.values() for row in rows if row.ticket.done}
        for ticket in finished - {leader}:
            self._queue.withdraw(ticket)
        if leader.done:  # first the next leader, so that the model is not kept idle
            self._leave(leader)
        for ticket in finished - {leader}:
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
    """Wakes a caller that does not sleep: lends it a thread to lead with, or tells it the end."""

    def __init__(self, ticket: Ticket, lend: Callable[[Ticket], None], done: Done) -> None:
        self._ticket = ticket
        self._lend = lend
        self._done: Done | None = done

    def set(self) -> None:
        if not self._ticket.done:
            self._lend(self._ticket)
        elif self._done is not None:
            done, self._done = self._done, None
            done(self._ticket)


def _interrupted() -> ServingError:
    return ServingError("the server was interrupted")
