"""A request in the batcher: its rows, how they are split into chunks, its context, its result."""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from mlflow_pt_deploy.model_config import Limits
from mlflow_pt_deploy.runtimes.base import Logits

Encoded = Any
"""A row as a preprocessor's `encode` returns it."""


class BatchShape(NamedTuple):
    """Size of a batch: rows, tokens of the longest row, tokens without padding."""

    rows: int = 0
    longest: int = 0
    tokens: int = 0

    def plus(self, other: BatchShape) -> BatchShape:
        """Shape of both together."""
        return BatchShape(
            self.rows + other.rows,
            max(self.longest, other.longest),
            self.tokens + other.tokens,
        )

    def padded(self, pads: bool) -> int:
        """Tokens computed; `pads`: whether rows are padded to the longest."""
        return self.rows * self.longest if pads else self.tokens

    def fits(self, limits: Limits, padding_budget: float | None, max_rows: int) -> bool:
        """Whether these rows should be one call of the model.

        Args:
            limits: Bounds the tokens of a call.
            padding_budget: Padding tokens that saving one call is worth; None: rows are not padded.
            max_rows: Most rows in a call.
        """
        padded = self.padded(padding_budget is not None)
        return (
            self.rows <= max_rows
            and padded <= limits.max_batch_tokens
            and padded - self.tokens <= (padding_budget or 0) * (self.rows - 1)
        )


class RowChunk(NamedTuple):
    """Rows of one request that are computed together."""

    indices: list[int]
    shape: BatchShape


class RowRef(NamedTuple):
    """One row of a request."""

    request: BatchRequest
    row: int

    @property
    def encoded(self) -> Encoded:
        return self.request.rows[self.row]


class RequestContext:
    """Per-request state shared by the protocol and the batcher.

    Attributes:
        expires_at: Deadline by `time.monotonic`, seconds; None: the client sent none.
        disconnected: True once the client closed the connection; its queued rows are dropped.
    """

    __slots__ = ("disconnected", "expires_at")

    def __init__(self, expires_at: float | None = None) -> None:
        self.expires_at = expires_at
        self.disconnected = False


class Notifier(Protocol):
    """Called when a request is done; `threading.Event` is one."""

    def set(self) -> None: ...


class BatchRequest:
    """One request, from its arrival in the batcher to its result.

    Args:
        rows: Encoded rows.
        dedup_keys: Deduplication key of each row; None: all rows differ.
        limits: Sets the default deadline.
        bounded: Whether the default deadline applies.
        context: Deadline of the client, and whether it is still connected.
    """

    def __init__(
        self,
        rows: Sequence[Encoded],
        dedup_keys: Sequence[Hashable] | None,
        limits: Limits,
        bounded: bool,
        context: RequestContext | None,
    ) -> None:
        self.rows = rows
        self.dedup_keys = dedup_keys or [(id(self), index) for index in range(len(rows))]
        self.chunks: list[RowChunk] = []
        self.results: list[Logits | None] = [None] * len(rows)
        self.missing = len(rows)
        self.error: Exception | None = None
        self.notifier: Notifier  # set before the request is queued
        self.context = context or RequestContext()
        self.expires_at = self.context.expires_at
        if bounded and limits.deadline_ms:
            server_s = time.monotonic() + limits.deadline_ms / 1000
            self.expires_at = min(server_s, self.expires_at or server_s)

    @property
    def done(self) -> bool:
        return self.error is not None or not self.missing

    def is_abandoned(self, now: float) -> bool:
        """Whether its result is not needed: the client is gone or the deadline passed by `now`."""
        return self.context.disconnected or (self.expires_at is not None and self.expires_at <= now)

    @property
    def queued_rows(self) -> int:
        """Rows not yet taken into a batch."""
        return sum(chunk.shape.rows for chunk in self.chunks)

    def set_row_result(self, index: int, result: Logits | Exception) -> None:
        """Store a row's logits, float32 (classes,), or its error."""
        if isinstance(result, Exception):
            self.error = self.error or result
        else:
            self.results[index] = result
            self.missing -= 1

    def remaining_s(self) -> float | None:
        """Seconds until the deadline, at least 0; None without one."""
        return None if self.expires_at is None else max(0.0, self.expires_at - time.monotonic())

    def result(self) -> Logits:
        """Logits of all rows, float32 (rows, classes).

        Raises:
            Exception: The first error of a row.
        """
        if self.error is not None:
            raise self.error
        results = [result for result in self.results if result is not None]
        return results[0][np.newaxis] if len(results) == 1 else np.stack(results)


def split_into_chunks(
    lengths: Sequence[int],
    indices: list[int],
    limits: Limits,
    padding_budget: float | None,
    max_rows: int,
) -> list[RowChunk]:
    """Split rows into chunks of similar length, each within the limits, the longest last.

    Args:
        lengths: Tokens of each row.
        indices: Indices of the rows to split.
        limits, padding_budget, max_rows: See `BatchShape.fits`.
    """
    if len(indices) == 1:  # the common request
        return [RowChunk(indices, BatchShape(1, lengths[indices[0]], lengths[indices[0]]))]
    chunks: list[RowChunk] = []
    for index in sorted(indices, key=lengths.__getitem__):
        length = lengths[index]
        single = BatchShape(1, length, length)
        wider = chunks[-1].shape.plus(single) if chunks else single
        if chunks and wider.fits(limits, padding_budget, max_rows):
            chunks[-1].indices.append(index)
            chunks[-1] = chunks[-1]._replace(shape=wider)
        else:
            chunks.append(RowChunk([index], single))
    return chunks
