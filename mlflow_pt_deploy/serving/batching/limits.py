"""Limits of batches and of the queue."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """How large a batch and how long a queue may become.

    Attributes:
        max_batch_rows: Most rows in one call of the model.
        max_batch_tokens: Most tokens in one call, padding included (rows x longest). A single
            row that is longer is computed alone. An image counts one token for each 16 x 16 pixels
            of the model's input.
        max_wait_ms: How long an idle model waits for more rows to batch; 0: not at all.
        queue_rows: Most rows in the queue, over all requests.
        deadline_ms: A request that is not answered by then fails with 504; 0: never.
    """

    max_batch_rows: int = 32
    max_batch_tokens: int = 2048
    max_wait_ms: float = 0
    queue_rows: int = 1024
    deadline_ms: float = 10_000
