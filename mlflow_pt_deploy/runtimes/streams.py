"""A batch's rows side by side, a thread each, instead of one call by all threads.

Threads that share a call wait for each other at every layer, and a short row beside a long one is
padded. Here each thread takes some rows of nearly the same length: OpenVINO calls this streams.

Knows arrays and threads; does not know which runtime computes.
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
# A row that takes less than this is not worth a call of its own, which costs some 0.05 ms.
_CHEAP_S = 0.3e-3
# Each call reads all weights: where they come from memory a row by itself costs up to twice as much
# as one of this many. More of them gain little, and the threads would be done less evenly.
_FEW = 4
# How many tokens of padding a call less is worth. On a Xeon with VNNI a call takes as long as ten
# tokens more in int8, and as four in fp32; short texts so take up to 11 % less CPU than without any
# padding, and 64 to 128 of them 3 to 8 % less than where all within two tokens share a call.
_CALL = 5
# All threads get a row alone where they take at most this share of one thread's time. Each way is
# tried in turns at first, then the other one once in a while.
_SOONER = 0.9
_FIRST_ROWS = 64
_TRIED_EVERY = 64


class RowGroup(NamedTuple):
    """Rows that are computed by one call: their places in the batch, their arrays."""

    places: npt.NDArray[np.int64]
    inputs: Inputs


class Streams:
    """A `Predict` that computes as many parts of a batch at a time as it has threads.

    A row that comes alone goes to one thread too, unless all of them are found to be sooner: they
    take the processor's time from others, and to wake them can take longer than the row.

    Args:
        whole: Computes rows with all threads.
        single: Computes rows with one thread; may be called by several threads at once.
        threads: How many.

    Attributes:
        threads: As given.
        pads: False: rows of any lengths may share a batch.
        tokens: How many the last batch had, what was padded all the same included; None before
            the first, and of images.
    """

    pads = False
    tokens: int | None = None

    def __init__(self, whole: Predict, single: Predict, *, threads: int) -> None:
        self.threads = threads
        self._whole, self._single = TimedPredictor(whole), TimedPredictor(single)
        self._lone_rows = 0

    def __call__(self, inputs: Inputs) -> Logits:
        rows = len(next(iter(inputs.values())))
        self.tokens = inputs[_MASK].size if _MASK in inputs else None
        if rows == 1:
            return self._lone(inputs)
        if not self._apart(inputs, rows):
            return self._whole.predict(inputs)
        parts = cut(inputs, self._most(rows))
        self.tokens = sum(part.inputs[_MASK].size for part in parts)
        found = self._compute(parts)
        logits = np.empty((rows, found[0].shape[1]), dtype=np.float32)
        for part, some in zip(parts, found, strict=True):
            logits[part.places] = some
        return logits

    @property
    def single(self) -> Predict:
        """Computes rows with one thread, as given; see `streams_of`."""
        return self._single.predict

    def _apart(self, inputs: Inputs, rows: int) -> bool:
        """Whether a batch's rows are worth calls of their own; images, all of a size, are not."""
        if _MASK not in inputs or rows < self.threads:
            return False
        return self._single.expected_s(_size(inputs) // rows) >= _CHEAP_S

    def _most(self, rows: int) -> int:
        """Rows in a part: few, so that all threads are done at about the same time."""
        each = math.ceil(rows / self.threads)
        return max(min(_FEW, each), math.ceil(each / 2))

    def _lone(self, inputs: Inputs) -> Logits:
        """Compute one row the better way, and now and then the other, to know which it is."""
        size = _size(inputs)
        sooner = self._whole.expected_s(size) < _SOONER * self._single.expected_s(size)
        every = 2 if self._lone_rows < _FIRST_ROWS else _TRIED_EVERY
        self._lone_rows += 1
        if self._lone_rows % every == 0:
            sooner = not sooner
        return (self._whole if sooner else self._single).timed(inputs, size)

    @cached_property
    def _helpers(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.threads - 1, thread_name_prefix="stream")

    def _compute(self, parts: list[RowGroup]) -> list[Logits]:
        """Logits of each part; this thread works too, and whoever is free takes the next."""
        found: dict[int, Logits] = {}
        waiting = iter(enumerate(parts))

        def work() -> None:
            for at, part in waiting:
                found[at] = self._single.predict(part.inputs)

        others = min(self.threads, len(parts)) - 1
        helped = [self._helpers.submit(work) for _ in range(others)]
        try:
            work()
        finally:
            wait(helped)
        for helper in helped:
            helper.result()
        return [found[at] for at in range(len(parts))]


class TimedPredictor:
    """One of two ways to compute a row, and what it has taken of late."""

    def __init__(self, predict: Predict) -> None:
        self.predict = predict
        self._cost = LatencyModel()

    def expected_s(self, size: int) -> float:
        return self._cost.predict_s(size, size)

    def timed(self, inputs: Inputs, size: int) -> Logits:
        start = perf_counter()
        logits = self.predict(inputs)
        self._cost.observe(size, perf_counter() - start)
        return logits


def cut(inputs: Inputs, most: int) -> list[RowGroup]:
    """Parts of a batch for which calls and padding together cost the least, the longest rows first.

    Args:
        inputs: A batch of texts, padded on the right.
        most: Rows in a part.
    """
    lengths = inputs[_MASK].sum(1)
    order = np.argsort(-lengths, kind="stable")
    parts = []
    for start, end in _runs(lengths[order].tolist(), most):
        size = math.ceil((end - start) / math.ceil((end - start) / most))
        for at in range(start, end, size):
            places = order[at : min(at + size, end)]
            longest = lengths[places[0]]
            parts.append(RowGroup(places, {k: v[places, :longest] for k, v in inputs.items()}))
    return parts


def _runs(lengths: list[int], most: int) -> list[tuple[int, int]]:
    """Where to cut rows of descending lengths, by dynamic programming; only between two lengths."""
    rows = len(lengths)
    bounds = [at for at in range(rows) if at == 0 or lengths[at] != lengths[at - 1]] + [rows]
    costs, starts = [0], [0]  # of the rows before each bound, and where their last run begins
    for end in bounds[1:]:
        totals = [
            before + (end - at) * lengths[at] - (at - end) // most * _CALL
            for before, at in zip(costs, bounds, strict=False)
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
    """Tokens; of images, how many."""
    return int(inputs[_MASK].sum()) if _MASK in inputs else len(next(iter(inputs.values())))
