"""Streams: split a batch into groups of rows and run each group on one thread.

Threads that share a call synchronize at every layer, and short rows are padded to the longest one.
Here each thread computes some rows of similar length. OpenVINO calls this concept streams.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cached_property
from time import perf_counter
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mlflow_pt_deploy.runtimes.base import Inputs, Logits, Predict
from mlflow_pt_deploy.runtimes.latency_model import LatencyModel

_MASK = "attention_mask"
# Batches whose rows take less than this stay together: a call has an overhead of about 0.05 ms.
_MIN_ROW_S = 0.3e-3
# Preferred rows per call. Each call reads all weights, so a single row costs up to twice as much as
# one of four. Larger groups gain little and balance the threads less evenly.
_ROWS_PER_CALL = 4
# Cost of a call in tokens: about 10 tokens in int8 and 4 in fp32 (Xeon with VNNI). Compared with no
# padding at all this saves up to 11 % of the CPU time of short texts.
_CALL_TOKENS = 5
# A single row uses all threads if they need at most this share of the time of one thread. Both ways
# alternate for the first rows; later the slower one is tried again once per `_RETRY_INTERVAL`.
_WHOLE_TIME_SHARE = 0.9
_EXPLORATION_ROWS = 64
_RETRY_INTERVAL = 64


class RowGroup(NamedTuple):
    """Rows of a batch that are computed by one call: their indices and their arrays."""

    indices: npt.NDArray[np.int64]
    inputs: Inputs


class Streams:
    """A `Predict` that computes groups of a batch's rows in parallel, one thread per group.

    A batch of one row runs on one thread too, unless all threads are measurably faster. They take
    CPU time from other work, and waking them can take longer than the row.

    Args:
        whole: Predictor that uses all threads.
        single: Predictor that uses one thread; must be safe for concurrent calls.
        threads: Number of threads.

    Attributes:
        threads: Number of threads.
        pads: False: rows of any lengths may share a batch.
        tokens: Tokens of the last batch including padding; None before the first batch and for
            images.
    """

    pads = False
    tokens: int | None = None

    def __init__(self, whole: Predict, single: Predict, *, threads: int) -> None:
        self.threads = threads
        self._whole, self._single = TimedPredictor(whole), TimedPredictor(single)
        self._single_rows = 0

    def __call__(self, inputs: Inputs) -> Logits:
        rows = len(next(iter(inputs.values())))
        self.tokens = inputs[_MASK].size if _MASK in inputs else None
        if rows == 1:
            return self._predict_row(inputs)
        if not self._should_split(inputs, rows):
            return self._whole.predict(inputs)
        groups = group_rows(inputs, self._max_rows(rows))
        self.tokens = sum(group.inputs[_MASK].size for group in groups)
        results = self._compute(groups)
        logits = np.empty((rows, results[0].shape[1]), dtype=np.float32)
        for group, result in zip(groups, results, strict=True):
            logits[group.indices] = result
        return logits

    @property
    def single(self) -> Predict:
        """The single-threaded predictor, see `streams_of`."""
        return self._single.predict

    def _should_split(self, inputs: Inputs, rows: int) -> bool:
        """Whether to split a batch; images have no padding and stay together."""
        if _MASK not in inputs or rows < self.threads:
            return False
        return self._single.expected_s(_size(inputs) // rows) >= _MIN_ROW_S

    def _max_rows(self, rows: int) -> int:
        """Maximum rows per group: few, so that the threads finish at about the same time."""
        per_thread = math.ceil(rows / self.threads)
        return max(min(_ROWS_PER_CALL, per_thread), math.ceil(per_thread / 2))

    def _predict_row(self, inputs: Inputs) -> Logits:
        """Compute one row the faster way, and sometimes the other way to update its latency."""
        size = _size(inputs)
        single_s = self._single.expected_s(size)
        use_whole = self._whole.expected_s(size) < _WHOLE_TIME_SHARE * single_s
        interval = 2 if self._single_rows < _EXPLORATION_ROWS else _RETRY_INTERVAL
        self._single_rows += 1
        if self._single_rows % interval == 0:
            use_whole = not use_whole
        return (self._whole if use_whole else self._single).timed(inputs, size)

    @cached_property
    def _helpers(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.threads - 1, thread_name_prefix="stream")

    def _compute(self, groups: list[RowGroup]) -> list[Logits]:
        """Logits of each group; the calling thread and the helper threads share one queue."""
        results: dict[int, Logits] = {}
        queue = iter(enumerate(groups))

        def work() -> None:
            for index, group in queue:
                results[index] = self._single.predict(group.inputs)

        count = min(self.threads, len(groups)) - 1
        futures = [self._helpers.submit(work) for _ in range(count)]
        try:
            work()
        finally:
            wait(futures)
        for future in futures:
            future.result()
        return [results[index] for index in range(len(groups))]


class TimedPredictor:
    """A predictor with a model of its recent latency."""

    def __init__(self, predict: Predict) -> None:
        self.predict = predict
        self._latency = LatencyModel()

    def expected_s(self, size: int) -> float:
        return self._latency.predict_s(size, size)

    def timed(self, inputs: Inputs, size: int) -> Logits:
        start = perf_counter()
        logits = self.predict(inputs)
        self._latency.observe(size, perf_counter() - start)
        return logits


def group_rows(inputs: Inputs, max_rows: int) -> list[RowGroup]:
    """Split a batch into groups with the lowest cost of calls and padding, longest rows first.

    Args:
        inputs: A batch of texts, padded on the right.
        max_rows: Maximum rows per group.
    """
    lengths = inputs[_MASK].sum(1)
    order = np.argsort(-lengths, kind="stable")
    groups = []
    for start, end in _optimal_runs(lengths[order].tolist(), max_rows):
        size = math.ceil((end - start) / math.ceil((end - start) / max_rows))
        for first in range(start, end, size):
            rows = order[first : min(first + size, end)]
            longest = lengths[rows[0]]
            groups.append(RowGroup(rows, {k: v[rows, :longest] for k, v in inputs.items()}))
    return groups


def _optimal_runs(lengths: list[int], max_rows: int) -> list[tuple[int, int]]:
    """Split rows of descending lengths by dynamic programming into (start, end) runs.

    Rows of equal length stay in one run.
    """
    rows = len(lengths)
    bounds = [row for row in range(rows) if row == 0 or lengths[row] != lengths[row - 1]] + [rows]
    costs, starts = (
        [0],
        [0],
    )  # cost of the rows before a bound; bound where their last run starts
    for end in bounds[1:]:
        totals = [
            cost + (end - start) * lengths[start] - (start - end) // max_rows * _CALL_TOKENS
            for cost, start in zip(costs, bounds, strict=False)
        ]
        costs.append(min(totals))
        starts.append(totals.index(costs[-1]))
    runs = []
    last = len(bounds) - 1
    while last:
        runs.append((bounds[starts[last]], bounds[last]))
        last = starts[last]
    return runs[::-1]


def _size(inputs: Inputs) -> int:
    """Number of tokens, or of images."""
    return int(inputs[_MASK].sum()) if _MASK in inputs else len(next(iter(inputs.values())))
