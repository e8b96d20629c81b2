"""Queue of requests; selects the rows of the next batch.

Not thread-safe: the batcher holds its lock.
"""

from __future__ import annotations

import time
from collections.abc import Hashable

from mlflow_pt_deploy.model_config import Limits
from mlflow_pt_deploy.serving.batching.request import BatchRequest, RowRef

Batch = dict[Hashable, list[RowRef]]
"""Rows of one call by deduplication key: all requests that wait for the same row."""


class RequestQueue:
    """Requests in order of arrival; a request stays until its last chunk is taken.

    Attributes:
        rows: Queued rows.
    """

    def __init__(self) -> None:
        self._requests: dict[BatchRequest, None] = {}  # an ordered set
        self._by_length: dict[int, dict[BatchRequest, None]] = {}  # of the next chunk
        self.rows = 0

    def __bool__(self) -> bool:
        return bool(self._requests)

    def push(self, request: BatchRequest) -> None:
        """Append a request."""
        self._requests[request] = None
        self._by_length.setdefault(request.chunks[-1].shape.longest, {})[request] = None
        self.rows += request.queued_rows

    def remove(self, request: BatchRequest) -> None:
        """Remove a request if it is queued."""
        if request not in self._requests:
            return
        del self._requests[request]
        length = request.chunks[-1].shape.longest
        del self._by_length[length][request]
        if not self._by_length[length]:
            del self._by_length[length]
        self.rows -= request.queued_rows

    def remove_abandoned(self) -> list[BatchRequest]:
        """Remove and return requests that are expired or whose client disconnected."""
        now = time.monotonic()
        found = [request for request in self._requests if request.is_abandoned(now)]
        for request in found:
            self.remove(request)
        return found

    def pop_batch(self, limits: Limits, padding_budget: float | None, max_rows: int) -> Batch:
        """The oldest request's next chunk and chunks of similar length; equal rows once.

        Args:
            limits, padding_budget, max_rows: See `BatchShape.fits`; the oldest request's chunk is
                always taken.
        """
        batch: Batch = {}
        requests = self._similar_length(limits, padding_budget, max_rows) if self._requests else ()
        for request in requests:
            self.remove(request)
            for index in request.chunks.pop().indices:
                batch.setdefault(request.dedup_keys[index], []).append(RowRef(request, index))
            if request.chunks:  # the rest queues again at the end
                self.push(request)
        return batch

    def _similar_length(
        self, limits: Limits, padding_budget: float | None, max_rows: int
    ) -> list[BatchRequest]:
        """The oldest request and those nearest to it in length, as many as fit."""
        oldest = next(iter(self._requests))
        taken, shape = [oldest], oldest.chunks[-1].shape
        target = shape.longest
        for length in sorted(self._by_length, key=lambda length: abs(length - target)):
            for request in self._by_length[length]:
                if shape.rows >= max_rows:
                    return taken
                if request is oldest:
                    continue
                wider = shape.plus(request.chunks[-1].shape)
                if not wider.fits(limits, padding_budget, max_rows):
                    break  # the other requests of this length most likely do not fit either
                taken.append(request)
                shape = wider
        return taken
