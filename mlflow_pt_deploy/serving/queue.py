"""Requests that wait for the model, and which of them are computed together.

Not safe for threads by itself: the batcher holds its lock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable

from mlflow_pt_deploy.serving.options import Limits
from mlflow_pt_deploy.serving.ticket import Row, Ticket

Batch = dict[Hashable, list[Row]]
"""What is computed at a time, by what makes rows the same: everyone who waits for it."""


class Queue:
    """Tickets in the order in which they came; one with many rows stays until its last chunk.

    Attributes:
        rows: How many wait.
    """

    def __init__(self) -> None:
        self._tickets: deque[Ticket] = deque()
        self.rows = 0

    def __bool__(self) -> bool:
        return bool(self._tickets)

    @property
    def oldest(self) -> Ticket:
        return self._tickets[0]

    def push(self, ticket: Ticket) -> None:
        self._tickets.append(ticket)
        self.rows += ticket.waiting_rows

    def withdraw(self, ticket: Ticket) -> None:
        """Forget a ticket, if it is here at all."""
        if ticket in self._tickets:
            self._tickets.remove(ticket)
            self.rows -= ticket.waiting_rows

    def withdraw_pointless(self) -> list[Ticket]:
        """Forget those that nobody waits for any more; returns them."""
        found = [ticket for ticket in self._tickets if ticket.pointless]
        for ticket in found:
            self.withdraw(ticket)
        return found

    def take(self, limits: Limits, slack: float | None) -> Batch:
        """The oldest request's next chunk, and what goes well with it; the same rows together.

        Args:
            limits: Of a batch.
            slack: As for `Shape.fits`.
        """
        if not self._tickets:
            return {}
        oldest = self.oldest.chunks[-1].shape
        taken, shape = [self.oldest], oldest
        younger = sorted(
            list(self._tickets)[1:], key=lambda t: abs(t.chunks[-1].shape.longest - oldest.longest)
        )
        for ticket in younger:
            wider = shape.plus(ticket.chunks[-1].shape)
            if wider.fits(limits, slack):
                taken.append(ticket)
                shape = wider
        self.rows -= shape.rows
        batch: Batch = {}
        for ticket in taken:
            for at in ticket.chunks.pop().indices:
                batch.setdefault(ticket.keys[at], []).append(Row(ticket, at))
        waiting = [ticket for ticket in self._tickets if ticket not in taken]
        self._tickets = deque(waiting + [ticket for ticket in taken if ticket.chunks])
        return batch
