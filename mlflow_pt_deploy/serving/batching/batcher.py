"""Micro-batcher: many callers, one model, bounded batches.

A caller that finds the model idle computes on its own thread (`Batcher.submit`) or, if it must not
block, on one of the batcher's (`Batcher.submit_nowait`). Requests that arrive meanwhile queue; the
thread that computes takes as many queued rows as fit next, until the queue is empty or its own
request is done; then a thread of the batcher takes over. So batches grow with the load, and an idle
model never waits.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Hashable, Sequence

from mlflow_pt_deploy.errors import DeadlineError, OverloadedError, ServingError
from mlflow_pt_deploy.model_config import Limits
from mlflow_pt_deploy.runtimes.base import Logits, Predict
from mlflow_pt_deploy.serving.batching.admission import STREAM_QUEUE_SHARE, AdmissionController
from mlflow_pt_deploy.serving.batching.concurrency import ConcurrencyLimiter
from mlflow_pt_deploy.serving.batching.executor import Collate, CountTokens, ModelExecutor, Results
from mlflow_pt_deploy.serving.batching.request import (
    BatchRequest,
    Encoded,
    RequestContext,
    RowRef,
    split_into_chunks,
)
from mlflow_pt_deploy.serving.batching.request_queue import Batch, RequestQueue

OnDone = Callable[[BatchRequest], None]

# More rows in a batch of a single thread gain little, and queued requests wait longer.
_STREAM_ROWS = 16

_NO_THREAD = (
    "server overloaded: no thread can be started; retry later. If this lasts, raise the limit of "
    "threads (ulimit -u, or the container's)"
)


class Batcher:
    """Gathers rows of concurrent requests into batches of similar length.

    The oldest request is always in the next batch; younger ones join where they add little padding.
    A request with many rows is split into chunks that take turns with other requests. Equal rows
    are computed once. A batch that fails is bisected, so that only requests with a failing row
    fail: one bad row of n costs about 2 log2(n) extra calls.

    Args:
        predict: The model; called by one thread at a time, see `allow_concurrent_calls`.
        collate: Joins encoded rows to named arrays, batch first.
        limits: Sizes and times.
        count_tokens: Cost of an encoded row.
        pads: Whether rows are padded to the longest in the batch.

    Attributes:
        executor: Runs the model and estimates its latency.
        concurrency: Running batches; one at a time unless `enable_streams` was called.
        admission: Decides which requests may enter.
    """

    def __init__(
        self,
        predict: Predict,
        collate: Collate,
        limits: Limits | None = None,
        count_tokens: CountTokens = len,
        pads: bool = True,
    ) -> None:
        self.limits = limits or Limits()
        self.executor = ModelExecutor(predict, collate, count_tokens, pads)
        self.concurrency = ConcurrencyLimiter()
        self._lock = threading.Lock()
        self._arrived = threading.Condition(self._lock)
        self._queue = RequestQueue()
        self.admission = AdmissionController(
            self.limits, lambda: self._queue.rows, self._estimated_wait_s
        )
        self._max_rows = self.limits.max_batch_rows
        self._running: list[Batch] = []

    @property
    def queued_rows(self) -> int:
        """Rows in the queue, without those being computed."""
        return self._queue.rows

    @property
    def estimated_row_s(self) -> float:
        """Recent seconds of a single row; 0 before the first."""
        return self.executor.estimated_s(1, 1)

    def release(self) -> None:
        """Break the cycle of references, so that the model is freed with the last request."""
        self.admission.release()

    def enable_streams(self, predict_single: Predict, streams: int) -> None:
        """Run several batches at a time from now on, each on one thread.

        No thread then waits for the others at the end of a batch (docs/benchmarks/serving.md).

        Args:
            predict_single: Computes a batch; may be called by several threads at once, and while
                the model itself computes.
            streams: Most batches at a time.
        """
        self.allow_concurrent_calls(streams)
        with self._lock:
            self._max_rows = min(self.limits.max_batch_rows, _STREAM_ROWS)
            self.executor.enable_streams(predict_single)

    def allow_concurrent_calls(self, calls: int) -> None:
        """Run several batches at a time from now on, all by the model itself.

        Args:
            calls: Most batches at a time.
        """
        with self._lock:
            self.concurrency.set_streams(calls)
            self.admission.queue_share = STREAM_QUEUE_SHARE

    def submit(
        self,
        rows: Sequence[Encoded],
        *,
        dedup_keys: Sequence[Hashable] | None = None,
        bounded: bool = True,
        context: RequestContext | None = None,
    ) -> Logits:
        """Compute one request; blocks until it is done.

        Args:
            rows: Encoded rows, e.g. token ids, unpadded.
            dedup_keys: Deduplication key of each row; None: all rows differ.
            bounded: False for batch scoring: no limit of the queue and no default deadline.
            context: Deadline of the client, and whether it is still connected.

        Returns:
            float32 (rows, classes), in the order of `rows`.

        Raises:
            OverloadedError: The queue is full, or the deadline would be missed.
            DeadlineError: The deadline passed.
            Exception: An error of the model for one of these rows.
        """
        request = BatchRequest(rows, dedup_keys, self.limits, bounded, context)
        request.notifier = event = threading.Event()
        computes = self._enqueue(request, bounded)
        try:
            if computes:
                self._run_batches(request)
            if not event.wait(request.remaining_s()):
                with self._lock:
                    if not request.done:
                        request.error = self.deadline_error()
        finally:
            with self._lock:
                self._queue.remove(request)
        return request.result()

    def submit_nowait(
        self,
        rows: Sequence[Encoded],
        on_done: OnDone,
        *,
        dedup_keys: Sequence[Hashable] | None = None,
        context: RequestContext | None = None,
    ) -> BatchRequest:
        """Compute one request without blocking the caller.

        Args:
            rows, dedup_keys, context: See `submit`. A queued request is dropped after its deadline,
                a running one is not: the caller has to set a timer.
            on_done: Called once with the request when it is done, on another thread and with the
                batcher locked: it must be short and must not call back.

        Raises:
            OverloadedError: See `submit`; or no thread can be started.
        """
        request = BatchRequest(rows, dedup_keys, self.limits, True, context)
        request.notifier = _CallbackNotifier(request, on_done)
        if self._enqueue(request, True) and not self.concurrency.run_in_thread(self._run_batches):
            with self._lock:
                self.concurrency.release()
                if not (self.concurrency.busy or request.done):
                    self._queue.remove(request)
                    raise OverloadedError(_NO_THREAD)
        return request

    def try_run_inline(
        self, rows: Sequence[Encoded], *, dedup_keys: Sequence[Hashable] | None = None
    ) -> Logits | None:
        """Compute a few rows on the calling thread as one batch, if the model is idle.

        Args:
            rows, dedup_keys: See `submit`.

        Returns:
            See `submit`; None if the model is busy or the rows do not fit one batch.

        Raises:
            Exception: An error of the model for any of the rows.
        """
        budget = self.executor.padding_budget
        shape = self.executor.shape(rows)
        if not shape.fits(self.limits, budget, self.limits.max_batch_rows):
            return None
        with self._lock:
            if self.concurrency.busy:
                return None
            self.concurrency.try_acquire()
        try:
            keys = dedup_keys or range(len(rows))
            distinct = dict(zip(keys, rows, strict=True))
            if len(distinct) == len(rows):
                return self.executor.run(rows, shape=shape)
            logits = self.executor.run(list(distinct.values()))
            order = {key: index for index, key in enumerate(distinct)}
            return logits[[order[key] for key in keys]]
        finally:
            self._release()

    def deadline_error(self) -> DeadlineError:
        """The error of a request whose deadline passed."""
        return DeadlineError(
            f"not computed within {self.limits.deadline_ms:g} ms (deadline_ms) or the request's "
            "own deadline; retry later or send fewer rows"
        )

    def _estimated_wait_s(self) -> float:
        queued = self.executor.estimated_s(self._queue.rows, self._max_rows)
        return queued / self.concurrency.streams

    def _enqueue(self, request: BatchRequest, bounded: bool) -> bool:
        """Admit and queue a request; True if the caller must run the next batches."""
        if not request.rows:
            raise ServingError("a request without rows cannot be computed; send at least one")
        lengths = self.executor.lengths(request.rows)
        request.chunks = split_into_chunks(
            lengths,
            self._attach_to_running_batch(request),
            self.limits,
            self.executor.padding_budget,
            self._stream_share(len(lengths)),
        )
        rows = request.queued_rows
        if not rows:
            return False
        with self._lock:
            if bounded and (reason := self.admission.rejection(request.remaining_s(), rows=rows)):
                raise OverloadedError(reason)
            self._queue.push(request)
            self._arrived.notify()
            return self.concurrency.try_acquire()

    def _stream_share(self, rows: int) -> int:
        """Rows of one batch if `rows` rows are spread over all streams."""
        return min(self._max_rows, math.ceil(rows / self.concurrency.streams))

    def _attach_to_running_batch(self, request: BatchRequest) -> list[int]:
        """Wait for equal rows that are being computed; returns the indices of the other rows."""
        others = []
        with self._lock:
            if not self._running:
                return list(range(len(request.rows)))
            for index, key in enumerate(request.dedup_keys):
                for batch in self._running:
                    if key in batch:
                        batch[key].append(RowRef(request, index))
                        break
                else:
                    others.append(index)
        return others

    def _run_batches(self, request: BatchRequest | None = None) -> None:
        """Compute until the queue is empty or, with a request, until that is done."""
        try:
            while not (request and request.done) and self._run_one_batch():
                pass
        finally:
            self._release()

    def _release(self) -> None:
        with self._lock:
            if not (self._queue and self.concurrency.run_in_thread(self._run_batches)):
                self.concurrency.release()

    def _run_one_batch(self) -> bool:
        """Compute one batch and deliver its results; False if there was none."""
        with self._lock:
            self._wait_for_more_rows()
            self._drop_expired()
            max_rows = self._stream_share(self._queue.rows)
            batch = self._queue.pop_batch(self.limits, self.executor.padding_budget, max_rows)
            if not batch:
                return False
            sole = self.concurrency.is_sole and not self._queue
            if (
                self._queue
                and self.concurrency.try_acquire()
                and not self.concurrency.run_in_thread(self._run_batches)
            ):
                self.concurrency.release()
            self._running.append(batch)
        results: Results = {}
        try:
            rows = [(key, refs[0].encoded) for key, refs in batch.items()]
            self.executor.run_bisecting(rows, results, sole)
        finally:
            with self._lock:
                self._running = [other for other in self._running if other is not batch]
                self._deliver(batch, results)
        return True

    def _deliver(self, batch: Batch, results: Results) -> None:
        for key, refs in batch.items():
            for ref in refs:
                result = results[key] if key in results else _interrupted()
                ref.request.set_row_result(ref.row, result)
        for request in {ref.request for refs in batch.values() for ref in refs}:
            if request.done:
                self._queue.remove(request)
                request.notifier.set()

    def _wait_for_more_rows(self) -> None:
        until = time.monotonic() + self.limits.max_wait_ms / 1000
        while self._queue.rows < self.limits.max_batch_rows:
            remaining = until - time.monotonic()
            if remaining <= 0:
                return
            self._arrived.wait(remaining)

    def _drop_expired(self) -> None:
        for request in self._queue.remove_abandoned():
            request.error = self.deadline_error()
            request.notifier.set()


class _CallbackNotifier:
    """Calls a function once instead of waking a waiting thread."""

    def __init__(self, request: BatchRequest, on_done: OnDone) -> None:
        self._request = request
        self._on_done: OnDone | None = on_done

    def set(self) -> None:
        if self._on_done is not None:
            on_done, self._on_done = self._on_done, None
            on_done(self._request)


def _interrupted() -> ServingError:
    return ServingError("the server was interrupted")
