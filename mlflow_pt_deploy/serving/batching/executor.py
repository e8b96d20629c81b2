"""Runs the model: estimates its latency and isolates failing rows."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Sequence

from mlflow_pt_deploy.errors import DeviceLostError, ServingError
from mlflow_pt_deploy.runtimes.base import Inputs, Logits, Predict, remote_calls, tokens_computed
from mlflow_pt_deploy.runtimes.device_memory import PartialBatchError
from mlflow_pt_deploy.runtimes.latency_model import LatencyModel
from mlflow_pt_deploy.serving.batching.request import BatchShape, Encoded

Collate = Callable[[Sequence[Encoded]], Inputs]
CountTokens = Callable[[Encoded], int]
OnCall = Callable[[int, int, int, float], None]
"""Called after each call of the model with rows, tokens, tokens with padding, seconds."""
Results = dict[Hashable, Logits | Exception]
"""A row's logits, float32 (classes,), or its error, by deduplication key."""

# For texts that one thread computes: saving a call is worth more, but a long queue has enough rows
# of nearly the same length.
_STREAM_PADDING = 2
# Upper bound of the padding that saving a call is worth, and its value before the first estimate.
_MAX_PADDING = 64


class ModelExecutor:
    """Runs the model and estimates the latency of its calls.

    Args:
        predict: The model.
        collate: Joins encoded rows to named arrays, batch first.
        count_tokens: Cost of an encoded row.
        pads: Whether rows are padded to the longest in the batch.

    Attributes:
        on_call: Observer of each call, if any.
    """

    def __init__(
        self,
        predict: Predict,
        collate: Collate,
        count_tokens: CountTokens = len,
        pads: bool = True,
    ) -> None:
        self._predict, self._collate = predict, collate
        self._count_tokens, self._pads = count_tokens, pads
        self._predict_single: Predict | None = None
        self._row_latency, self._token_latency = LatencyModel(), LatencyModel()
        self._lock = threading.Lock()
        self.on_call: OnCall | None = None
        self._started: dict[int, float] = {}  # by thread

    def enable_streams(self, predict_single: Predict) -> None:
        """Use `predict_single`, from several threads at once, unless a call is the only one."""
        self._predict_single, self._pads = predict_single, True

    @property
    def running_s(self) -> float:
        """Seconds since the oldest running call began; 0 if none is running.

        A call of a remote predictor also waits for other workers; its device process is watched
        instead.
        """
        if remote_calls(self._predict):
            return 0.0
        started = min(list(self._started.values()), default=None)
        return 0.0 if started is None else time.perf_counter() - started

    @property
    def padding_budget(self) -> float | None:
        """Padding tokens that saving one call is worth, see `BatchShape.fits`."""
        if not self._pads:
            return None
        if self._predict_single is not None:
            return _STREAM_PADDING
        call_s, token_s = self._token_latency.overhead_s, self._token_latency.per_item_s
        return min(call_s / token_s, _MAX_PADDING) if token_s else _MAX_PADDING

    def estimated_s(self, rows: int, max_rows: int) -> float:
        """Estimated seconds for `rows` rows, at most `max_rows` a call; 0 before the first call."""
        return self._row_latency.predict_s(rows, max_rows)

    def lengths(self, rows: Sequence[Encoded]) -> list[int]:
        """Tokens of each row."""
        return [self._count_tokens(row) for row in rows]

    def shape(self, rows: Sequence[Encoded]) -> BatchShape:
        """Shape of rows that are computed together."""
        lengths = self.lengths(rows)
        return BatchShape(len(rows), max(lengths), sum(lengths))

    def run(
        self, rows: Sequence[Encoded], sole: bool = True, shape: BatchShape | None = None
    ) -> Logits:
        """Call the model once.

        Args:
            rows: Encoded rows.
            sole: Whether no other call is running, so that this one may use all threads.
            shape: Shape of the rows, if it is known.

        Returns:
            float32 (rows, classes).

        Raises:
            Exception: An error of the model.
        """
        single = None if sole and len(rows) == 1 else self._predict_single
        predict = single or self._predict
        thread = threading.get_ident()
        self._started[thread] = start = time.perf_counter()
        try:
            logits = predict(self._collate(rows))
        finally:
            del self._started[thread]
        self._learn(shape or self.shape(rows), predict, time.perf_counter() - start)
        if len(logits) != len(rows):
            raise ServingError(f"the model returned {len(logits)} rows for {len(rows)}")
        return logits

    def run_bisecting(
        self, rows: Sequence[tuple[Hashable, Encoded]], results: Results, sole: bool
    ) -> None:
        """Run one batch; on failure bisect it until each failing row is isolated.

        Where memory was short the error names the rows, and nothing is computed again.

        Args:
            rows: Rows with their deduplication keys.
            results: Gets the result of each row.
            sole: See `run`.
        """
        try:
            logits = self.run([row for _, row in rows], sole)
        except DeviceLostError as error:  # says nothing about the rows
            results.update(dict.fromkeys((key for key, _ in rows), error))
            return
        except PartialBatchError as error:
            for number, (key, _) in enumerate(rows):
                if error.logits is None or number in error.rows:
                    results[key] = error
                else:
                    results[key] = error.logits[number]
            return
        except Exception as error:
            if len(rows) == 1:
                results[rows[0][0]] = error
                return
            middle = len(rows) // 2
            for half in (rows[:middle], rows[middle:]):
                self.run_bisecting(half, results, sole)
            return
        results.update(zip((key for key, _ in rows), logits, strict=True))

    def _learn(self, shape: BatchShape, predict: Predict, seconds: float) -> None:
        padded = shape.padded(self._pads)
        with self._lock:
            self._row_latency.observe(shape.rows, seconds)
            if self._pads and self._predict_single is None:  # else `padding_budget` is constant
                self._token_latency.observe(padded, seconds)
            if self.on_call is not None:
                computed = tokens_computed(predict, padded)
                self.on_call(shape.rows, shape.tokens, computed, seconds)
