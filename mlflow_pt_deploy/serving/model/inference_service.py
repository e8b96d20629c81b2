"""Scores rows with one loaded model, for the HTTP application and for MLflow's pyfunc.

Requests that arrive in one event loop iteration form one batch. If the model is faster than a
thread hand-off, the batch runs inline on the event loop. The fast stage of a cascade may also run
inline; only requests that it is unsure of go on. All other requests go to the micro-batcher. The
event loop never waits for a thread.
"""

from __future__ import annotations

import asyncio
import json
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING

import numpy as np

from mlflow_pt_deploy.errors import RequestError, RowError
from mlflow_pt_deploy.preprocessing import Row
from mlflow_pt_deploy.runtimes.base import Logits, pads_rows, remote_calls, streams_of
from mlflow_pt_deploy.runtimes.cascade import CascadePredictor
from mlflow_pt_deploy.serving.batching.admission import LoopIterationEstimator
from mlflow_pt_deploy.serving.batching.batcher import Batcher
from mlflow_pt_deploy.serving.batching.request import BatchRequest, Encoded, RequestContext
from mlflow_pt_deploy.serving.model.outputs import PredictionFormatter
from mlflow_pt_deploy.serving.model.prediction_cache import CachedPrediction, PredictionCache
from mlflow_pt_deploy.serving.model.version_counts import VersionCounts
from mlflow_pt_deploy.serving.model.warmup import (
    FEW,
    fastest_s,
    warm_up_buckets,
    warm_up_shapes,
)

if TYPE_CHECKING:
    from mlflow_pt_deploy.artifacts import LoadedVariant
    from mlflow_pt_deploy.model_config import ServingOptions

# A thread hand-off takes about 0.2 ms of two cores, more if the threads have to be woken.
INLINE_THRESHOLD_S = 0.5e-3
# The event loop is blocked while a model runs on it.
MAX_INLINE_ROWS = 256
# without a Python frame for each step, unlike a comprehension
_ENCODED: Callable[[PendingRequest], Sequence[Encoded]] = attrgetter("encoded")
_ROWS: Callable[[PendingRequest], Sequence[Row]] = attrgetter("rows")


@dataclass(slots=True, eq=False)
class PendingRequest:
    """A request on the event loop; `future` gets its predictions as JSON, one string per row.

    If some rows are cached, `cached` has an entry for each row of the request, and `rows` and
    `encoded` have the other rows.
    """

    rows: Sequence[Row]
    encoded: Sequence[Encoded] | None
    top_k: int
    context: RequestContext
    future: asyncio.Future[list[str]]
    timer: asyncio.TimerHandle | None = None
    cached: Sequence[CachedPrediction | None] = ()


class InferenceService:
    """One loaded model behind a micro-batcher.

    Args:
        loaded: Model, preprocessor and labels.
        options: Sizes, times, device.

    Attributes:
        batcher: Runs the model.
        formatter: Converts logits to predictions.
        runs_inline: Whether a row is faster than a thread hand-off; set by `warm_up`.
        fast_stage_runs_inline: The same for the fast stage of a cascade.
        counts: What was answered by `submit`.
        cache: Predictions for rows that come again; None: none are kept.
    """

    def __init__(self, loaded: LoadedVariant, options: ServingOptions) -> None:
        preprocessor = loaded.preprocessor
        self.loaded = loaded
        self.options = options
        self.formatter = PredictionFormatter(loaded.labels)
        self.counts = VersionCounts(labels=[0] * len(loaded.labels))
        self.cache: PredictionCache | None = None
        self._unknown_id = preprocessor.unknown_id
        self._counts_tokens = preprocessor.column == "text"
        self.batcher = Batcher(
            loaded.predict,
            preprocessor.collate,
            options,
            preprocessor.token_count,
            pads_rows(loaded.predict),
        )
        self.runs_inline = self.fast_stage_runs_inline = False
        calls = remote_calls(loaded.predict)
        self._may_run_inline = not calls
        if calls:
            self.batcher.allow_concurrent_calls(calls)
        self._pending: list[PendingRequest] = []
        self._loop_cost = LoopIterationEstimator()
        self._finished: deque[tuple[PendingRequest, BatchRequest]] = deque()
        self._collecting = False
        self._in_batcher = 0

    @property
    def ready(self) -> bool:
        """Whether the model can compute; a remote predictor may lose its device."""
        return bool(getattr(self.loaded.predict, "ready", True))

    def warm_up(self) -> None:
        """Run a few input shapes, so that the first requests are not slow.

        Raises:
            ServingError: A prediction holds NaN or infinity.
            Exception: An error of the model.
        """
        preprocessor, predict = self.loaded.preprocessor, self.loaded.predict
        models = predict.models if isinstance(predict, CascadePredictor) else (predict,)
        warm_up_buckets(models, self.options, preprocessor)
        samples = preprocessor.warmup_rows()
        for sample in samples:
            for rows in {1, 4, min(16, self.options.max_batch_rows)}:
                self.formatter.to_objects(self.batcher.submit([sample] * rows, bounded=False))
        if preprocessor.column != "text":
            return
        longest = samples[-1]
        warm_up_shapes(models, preprocessor.collate([longest] * max(FEW)))
        if self.options.max_wait_ms:
            return
        row_s = fastest_s(lambda: self.batcher.submit([longest], bounded=False))
        self.runs_inline = self._may_run_inline and row_s < INLINE_THRESHOLD_S
        predict_single, streams = streams_of(predict)
        if streams > 1 and not self.runs_inline:
            self.batcher.enable_streams(predict_single, streams)
        if isinstance(predict, CascadePredictor):
            stage_s = fastest_s(lambda: predict.run_fast_stage(preprocessor.collate([longest])))
            self.fast_stage_runs_inline = stage_s < INLINE_THRESHOLD_S

    def forbid_inline(self) -> None:
        """Run the model on threads only, so that it never delays the event loop."""
        self.runs_inline = self.fast_stage_runs_inline = self._may_run_inline = False

    def encode(self, rows: Sequence[Row], first: int = 0) -> list[Encoded]:
        """Encode raw rows; `first` is the index of the first one in its request.

        Raises:
            RequestError: A row cannot be read; the message has its index.
        """
        try:
            return list(self.loaded.preprocessor.encode(rows))
        except RowError as error:
            raise self._row_error(first + error.row, error) from error

    def encode_missing(self, rows: Sequence[Row], top_k: int) -> list[Encoded | None]:
        """Encode the rows that are not cached, on any thread; the others are None.

        Raises:
            RequestError: See `encode`.
        """
        cache = self.cache
        if cache is None:
            return list(self.encode(rows))
        missing = [at for at, row in enumerate(rows) if not cache.holds(row, top_k)]
        found: list[Encoded | None] = [None] * len(rows)
        try:
            encoded = self.loaded.preprocessor.encode([rows[at] for at in missing])
        except RowError as error:
            raise self._row_error(missing[error.row], error) from error
        for at, each in zip(missing, encoded, strict=True):
            found[at] = each
        return found

    def _row_error(self, number: int, error: RowError) -> RequestError:
        return RequestError(f"'{self.loaded.preprocessor.column}' row {number} {error.fault}")

    def predict(
        self,
        rows: Sequence[Row],
        *,
        bounded: bool = True,
        context: RequestContext | None = None,
    ) -> list[Logits]:
        """Score rows on the calling thread; blocks until they are computed.

        Args:
            rows: Raw rows.
            bounded: False for batch scoring, see `Batcher.submit`.
            context: See `Batcher.submit`.

        Returns:
            Logits of consecutive slices of the rows: float32 (rows, classes) each.

        Raises:
            RequestError: A row cannot be read.
            ServingError: See `Batcher.submit`.
        """
        size = self.loaded.preprocessor.slice_rows
        found = []
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            encoded = self.encode(part, start)
            found.append(
                self.batcher.submit(encoded, dedup_keys=part, bounded=bounded, context=context)
            )
        return found

    def check_row_count(self, count: int) -> None:
        """Check that a request does not have too many rows.

        Raises:
            RequestError: There are more than `queue_rows`.
        """
        most = self.options.queue_rows
        if count > most:
            raise RequestError(
                f"'{self.loaded.preprocessor.column}' has {count} rows; one request may have "
                f"{most} (queue_rows). Send several smaller requests."
            )

    def rejection(self, remaining_s: float | None, in_flight: int = 0) -> str:
        """Reason to reject a request before its body is parsed; empty if it is admitted.

        Args:
            remaining_s: Seconds until its deadline.
            in_flight: Requests being answered on this event loop.
        """
        # what the batcher holds waits for the model, not for the event loop
        loop_wait_s = max(0, in_flight - self._in_batcher) * self._loop_cost.request_s
        return self.batcher.admission.rejection(remaining_s, loop_wait_s=loop_wait_s)

    def submit(
        self,
        rows: Sequence[Row],
        top_k: int,
        context: RequestContext,
        encoded: Sequence[Encoded | None] | None = None,
    ) -> asyncio.Future[list[str]]:
        """Score rows for a request on the event loop.

        Args:
            rows: Raw rows.
            top_k: Labels per row.
            context: Deadline, and whether the client is still connected.
            encoded: The encoded rows, if `encode` or `encode_missing` was called already.

        Returns:
            Predictions as JSON, one string per row; or an error, see `Batcher.submit`.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[list[str]] = loop.create_future()
        request = PendingRequest(rows, encoded, top_k, context, future)
        if self.cache is not None and self._answer_cached(request, self.cache):
            return future
        if not self._pending:
            self._loop_cost.begin_iteration()
            loop.call_soon(self._flush)
        self._pending.append(request)
        return future

    def _answer_cached(self, request: PendingRequest, cache: PredictionCache) -> bool:
        """Answer from the cache; False if rows are missing, which the request then has alone."""
        cached = cache.lookup(request.rows, request.top_k)
        found = [each for each in cached if each is not None]
        if found and len(found) == len(cached):
            self._count_cached(found)
            request.future.set_result([each.text for each in found])
            return True
        missing = [at for at, each in enumerate(cached) if each is None]
        if found:
            request.cached = cached
            request.rows = [request.rows[at] for at in missing]
        if request.encoded is not None:
            encoded = [request.encoded[at] for at in missing]
            # a row that was evicted since its request was parsed is not encoded
            request.encoded = None if any(each is None for each in encoded) else encoded
        return False

    def _count_cached(self, found: Sequence[CachedPrediction]) -> None:
        tokens = [[each.tokens for each in found]] if self._counts_tokens else ()
        self.counts.count_rows([each.best for each in found], tokens, self._unknown_id)

    def _cache_answers(
        self, request: PendingRequest, texts: list[str], best: Iterable[tuple[int, float]]
    ) -> list[str]:
        """Keep the predictions of a request; returns them with those that were cached before."""
        assert self.cache is not None and request.encoded is not None
        rows = zip(request.rows, texts, best, request.encoded, strict=True)
        for row, text, top, ids in rows:
            tokens = array("i", ids if self._counts_tokens else ())
            self.cache.add(row, request.top_k, CachedPrediction(text, top, tokens))
        if not request.cached:
            return texts
        self._count_cached([each for each in request.cached if each is not None])
        computed = iter(texts)
        return [next(computed) if each is None else each.text for each in request.cached]

    def _flush(self) -> None:
        """Score the requests of this event loop iteration, at most `MAX_INLINE_ROWS` rows."""
        requests = self._next_batch()
        now = time.monotonic()
        active: list[PendingRequest] = []
        rows = 0
        for request in requests:
            expires_at = request.context.expires_at
            if expires_at is not None and now >= expires_at:
                self._expire(request)
            elif self._encode(request):
                active.append(request)
                rows += len(request.rows)
        if active and rows <= self.options.max_batch_rows:
            self._score(active)
        else:
            for group in self._groups(active):
                self._score(group)
        self._loop_cost.end_iteration(len(requests))
        if self._pending:
            self._loop_cost.begin_iteration()

    def _groups(self, requests: Sequence[PendingRequest]) -> Iterator[list[PendingRequest]]:
        """Consecutive requests that fit one call of the model together."""
        group: list[PendingRequest] = []
        rows = 0
        for request in requests:
            rows += len(request.rows)
            if group and rows > self.options.max_batch_rows:
                yield group
                group, rows = [], len(request.rows)
            group.append(request)
        if group:
            yield group

    def _next_batch(self) -> list[PendingRequest]:
        count = rows = 0
        for request in self._pending:
            rows += len(request.rows)
            if count and rows > MAX_INLINE_ROWS:
                break
            count += 1
        requests, self._pending = self._pending[:count], self._pending[count:]
        if self._pending:
            asyncio.get_running_loop().call_soon(self._flush)
        return requests

    def _encode(self, request: PendingRequest) -> bool:
        try:
            if request.encoded is None:
                request.encoded = self.encode(request.rows)
        except Exception as error:
            self._fail(request, error)
            return False
        return True

    def _score(self, requests: Sequence[PendingRequest]) -> None:
        encoded = list(chain.from_iterable(map(_ENCODED, requests)))
        try:
            if self.fast_stage_runs_inline and len(encoded) <= MAX_INLINE_ROWS:
                requests = self._run_fast_stage(requests, encoded)
            elif self._should_run_inline(len(encoded)):
                keys = list(chain.from_iterable(map(_ROWS, requests)))
                logits = self.batcher.try_run_inline(encoded, dedup_keys=keys)
                if logits is not None:
                    self._respond(requests, logits)
                    return
        except Exception:  # the batcher isolates the failing row
            requests = [request for request in requests if not request.future.done()]
        for request in requests:
            self._queue(request)

    def _should_run_inline(self, rows: int) -> bool:
        """Whether scoring on the event loop costs less than a thread hand-off."""
        if self.batcher.concurrency.busy or self.options.max_wait_ms or rows > MAX_INLINE_ROWS:
            return False
        if not self._may_run_inline:
            return False
        return self.runs_inline or 0 < rows * self.batcher.estimated_row_s < INLINE_THRESHOLD_S

    def _run_fast_stage(
        self, requests: Sequence[PendingRequest], encoded: Sequence[Encoded]
    ) -> list[PendingRequest]:
        """Answer requests that a cascade's fast stage is sure of; returns the other requests."""
        stages = self.loaded.predict
        assert isinstance(stages, CascadePredictor)
        logits, unsure = stages.run_fast_stage(self.loaded.preprocessor.collate(encoded))
        sure: list[PendingRequest] = []
        parts: list[Logits] = []
        others: list[PendingRequest] = []
        start = 0
        for request in requests:
            rows = slice(start, start + len(request.rows))
            start = rows.stop
            if unsure[rows].any():
                others.append(request)
            else:
                sure.append(request)
                parts.append(logits[rows])
        if sure:
            self._respond(sure, np.concatenate(parts))
        return others

    def _queue(self, request: PendingRequest) -> None:
        """Pass a request to the micro-batcher."""
        loop = asyncio.get_running_loop()
        try:
            queued = self.batcher.submit_nowait(
                request.encoded or (),
                partial(self._on_batch_done, loop, request),
                dedup_keys=request.rows,
                context=request.context,
            )
        except Exception as error:
            self._fail(request, error)
            return
        self._in_batcher += 1
        remaining_s = queued.remaining_s()
        if remaining_s is not None:
            request.timer = loop.call_later(remaining_s, self._expire, request)

    def _on_batch_done(
        self, loop: asyncio.AbstractEventLoop, request: PendingRequest, done: BatchRequest
    ) -> None:
        """Wake the event loop once for all finished requests; runs on a thread of the batcher."""
        self._finished.append((request, done))
        if not self._collecting:
            self._collecting = True
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._collect)

    def _collect(self) -> None:
        self._collecting = False  # first: a request that finishes from here on wakes the loop again
        requests: list[PendingRequest] = []
        parts: list[Logits] = []
        while self._finished:
            request, done = self._finished.popleft()
            self._in_batcher -= 1
            if request.timer is not None:
                request.timer.cancel()
            if done.error is None:
                requests.append(request)
                parts.append(done.result())
            else:
                self._fail(request, done.error)
        if requests:
            self._respond(requests, np.concatenate(parts))

    def _respond(self, requests: Sequence[PendingRequest], logits: Logits) -> None:
        """Format the logits of all requests together; float32 (rows of all requests, classes)."""
        try:
            best = self.formatter.best(logits)
        except Exception as error:
            if len(requests) == 1:
                self._fail(requests[0], error)
                return
            start = 0
            for request in requests:  # NaN fails only the request that it belongs to
                stop = start + len(request.rows)
                self._respond([request], logits[start:stop])
                start = stop
            return
        formatted = self.formatter.to_json(best)
        encoded = map(_ENCODED, requests) if self._counts_tokens else ()
        self.counts.count_rows(best, encoded, self._unknown_id)
        start = 0
        for request in requests:
            stop = start + len(request.rows)
            texts = formatted[start:stop]
            if request.top_k > 1:
                ranked = self.formatter.to_objects(logits[start:stop], request.top_k)
                texts = [json.dumps(labels) for labels in ranked]
            if self.cache is not None:
                texts = self._cache_answers(request, texts, best[start:stop])
            if not request.future.done():
                request.future.set_result(texts)
            start = stop

    def _expire(self, request: PendingRequest) -> None:
        self._fail(request, self.batcher.deadline_error())
        request.context.disconnected = True  # the batcher drops what it has not begun

    def _fail(self, request: PendingRequest, error: Exception) -> None:
        if not request.future.done():
            request.future.set_exception(error)
