"""Requests that wait for the model, and which of them are computed together.

Not safe for threads by itself: the batcher holds its lock.
"""

from __future__ import annotations

import time
from collections.abc import Hashable

from mlflow_pt_deploy.serving.batching.request import Row, Ticket
from mlflow_pt_deploy.serving.model.options import Limits

Batch = dict[Hashable, list[Row]]
"""What is computed at a time, by what makes rows the same: everyone who waits for it."""


class Queue:
    """Tickets in the order in which they came; one with many rows stays until its last chunk.

    Attributes:
        rows: How many wait.
    """

    def __init__(self) -> None:
        self._tickets: dict[Ticket, None] = {}  # a set in order
        self._by_length: dict[int, dict[Ticket, None]] = {}  # of the next chunk's longest row
        self.rows = 0

    def __bool__(self) -> bool:
        return bool(self._tickets)

    def push(self, ticket: Ticket) -> None:
        self._tickets[ticket] = None
        self._by_length.setdefault(ticket.chunks[-1].shape.longest, {})[ticket] = None
        self.rows += ticket.waiting_rows

    def withdraw(self, ticket: Ticket) -> None:
        """Forget a ticket, if it is here at all."""
        if ticket not in self._tickets:
            return
        del self._tickets[ticket]
        length = ticket.chunks[-1].shape.longest
        del self._by_length[length][ticket]
        if not self._by_length[length]:
            del self._by_length[length]
        self.rows -= ticket.waiting_rows

    def withdraw_pointless(self) -> list[Ticket]:
        """Forget those that nobody waits for any more; returns them."""
        now = time.monotonic()
        found = [ticket for ticket in self._tickets if ticket.pointless(now)]
        for ticket in found:
            self.withdraw(ticket)
        return found

    def take(self, limits: Limits, slack: float | None, most: int) -> Batch:
        """The oldest request's next chunk, and what goes well with it; the same rows together.

        Args:
            limits, slack, most: As for `Shape.fits`; the oldest request's chunk is taken anyway.
        """
        batch: Batch = {}
        for ticket in self._alike(limits, slack, most) if self._tickets else ():
            self.withdraw(ticket)
            for at in ticket.chunks.pop().indices:
                batch.setdefault(ticket.keys[at], []).append(Row(ticket, at))
            if ticket.chunks:  # behind all others
                self.push(ticket)
        return batch

    def _alike(self, limits: Limits, slack: float | None, most: int) -> list[Ticket]:
        """The oldest, and those whose length is the nearest, as many as fit."""
        oldest = next(iter(self._tickets))
        taken, shape = [oldest], oldest.chunks[-1].shape
        wanted = shape.longest
        for length in sorted(self._by_length, key=lambda length: abs(length - wanted)):
            for ticket in self._by_length[length]:
                if shape.rows >= most:
                    return taken
                if ticket is oldest:
                    continue
                wider = shape.plus(ticket.chunks[-1].shape)
                if not wider.fits(limits, slack, most):
                    break  # nor do, most likely, the others of that length
                taken.append(ticket)
                shape = wider
        return taken
