"""One request on its way through the batcher: its rows, its chunks, its caller, its answer.

Knows neither threads' turns nor the model; see `batcher` for who computes what when.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from mlflow_pt_deploy.runtimes.base import Logits
from mlflow_pt_deploy.serving.model.options import Limits

Encoded = Any
"""A row as a preprocessor's `encode` gave it."""


class Shape(NamedTuple):
    """What decides whether rows go together: their number, the longest, tokens unpadded."""

    rows: int = 0
    longest: int = 0
    tokens: int = 0

    def plus(self, other: Shape) -> Shape:
        return Shape(
            self.rows + other.rows,
            max(self.longest, other.longest),
            self.tokens + other.tokens,
        )

    def padded(self, pads: bool) -> int:
        """Tokens that are computed; `pads`: whether rows are padded to the longest."""
        return self.rows * self.longest if pads else self.tokens

    def fits(self, limits: Limits, slack: float | None, most: int) -> bool:
        """Whether these rows should be one call.

        Args:
            limits: Of a call's tokens.
            slack: How many tokens of padding a call less is worth; None: rows are not padded.
            most: Rows in a call.
        """
        padded = self.padded(slack is not None)
        return (
            self.rows <= most
            and padded <= limits.max_batch_tokens
            and padded - self.tokens <= (slack or 0) * (self.rows - 1)
        )


class Chunk(NamedTuple):
    """Rows of one request that are computed together."""

    indices: list[int]
    shape: Shape


class Row(NamedTuple):
    """One row of a request."""

    ticket: Ticket
    at: int

    @property
    def encoded(self) -> Encoded:
        return self.ticket.rows[self.at]


class Caller:
    """Somebody who waits for an answer; whoever holds this may call the request off.

    Attributes:
        expires: When he waits no longer, by `time.monotonic`, in seconds; None: he does not say.
        left: True once he is gone; his rows are then not computed any more.
    """

    __slots__ = ("expires", "left")

    def __init__(self, expires: float | None = None) -> None:
        self.expires = expires
        self.left = False


def seconds_left(limits: Limits, his_s: float | None) -> float | None:
    """How long a request may take: as ours or its caller's patience allows; None: for ever."""
    ours_s = limits.deadline_ms / 1000
    if his_s is None:
        return ours_s or None
    return min(ours_s, his_s) if ours_s else his_s


def expiry(limits: Limits, caller: Caller) -> float | None:
    """When a request that comes now is given up, by `time.monotonic`; None: never."""
    now = time.monotonic()
    his_s = None if caller.expires is None else caller.expires - now
    left_s = seconds_left(limits, his_s)
    return None if left_s is None else now + left_s


class Wake(Protocol):
    """Told when a ticket is done."""

    def set(self) -> None: ...


class Ticket:
    """One caller's request, from its arrival to its answer."""

    def __init__(
        self,
        rows: Sequence[Encoded],
        keys: Sequence[Hashable] | None,
        limits: Limits,
        deadline: bool,
        caller: Caller | None,
    ) -> None:
        self.rows = rows
        self.keys = keys or [(id(self), at) for at in range(len(rows))]
        self.chunks: list[Chunk] = []
        self.answers: list[Logits | None] = [None] * len(rows)
        self.missing = len(rows)
        self.error: Exception | None = None
        self.wake: Wake  # set by whoever waits, before the ticket lines up
        self.caller = caller or Caller()
        self.expires = expiry(limits, self.caller) if deadline else self.caller.expires

    @property
    def done(self) -> bool:
        return self.error is not None or not self.missing

    def pointless(self, now: float) -> bool:
        """Whether nobody waits for the answer any more, by `time.monotonic`."""
        return self.caller.left or (self.expires is not None and self.expires <= now)

    @property
    def waiting_rows(self) -> int:
        """Rows that nobody has taken yet."""
        return sum(chunk.shape.rows for chunk in self.chunks)

    def put(self, index: int, answer: Logits | Exception) -> None:
        if isinstance(answer, Exception):
            self.error = self.error or answer
        else:
            self.answers[index] = answer
            self.missing -= 1

    def left_s(self) -> float | None:
        """Seconds until the deadline, never below 0; None without one."""
        return None if self.expires is None else max(0.0, self.expires - time.monotonic())

    def result(self) -> Logits:
        if self.error is not None:
            raise self.error
        answers = [answer for answer in self.answers if answer is not None]
        return answers[0][np.newaxis] if len(answers) == 1 else np.stack(answers)


def cut(
    lengths: Sequence[int], indices: list[int], limits: Limits, slack: float | None, most: int
) -> list[Chunk]:
    """Chunks of rows of similar length, each within the limits, the longest last.

    Args:
        lengths: Of all rows.
        indices: The rows to cut.
        limits, slack, most: As for `Shape.fits`.
    """
    if len(indices) == 1:  # the common request
        return [Chunk(indices, Shape(1, lengths[indices[0]], lengths[indices[0]]))]
    chunks: list[Chunk] = []
    for index in sorted(indices, key=lengths.__getitem__):
        length = lengths[index]
        alone = Shape(1, length, length)
        wider = chunks[-1].shape.plus(alone) if chunks else alone
        if chunks and wider.fits(limits, slack, most):
            chunks[-1].indices.append(index)
            chunks[-1] = chunks[-1]._replace(shape=wider)
        else:
            chunks.append(Chunk([index], alone))
    return chunks
