"""Interleaved timing: a variant and the baseline run the same rows alternately."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from mlflow_pt_deploy.errors import VariantError
from mlflow_pt_deploy.evaluation.worker_client import Worker

BATCH_ROWS = (8, 32, 128)
GPU_BATCH_ROWS = (*BATCH_ROWS, 512, 1024)
MIN_ROUNDS = 6
_REPEATS = 3
_MAX_ROUNDS = 200
LATENCY_SHARE = 0.6  # of the time budget; the rest is for throughput
_BLOCK_S = 0.15  # short compared with frequency drift of the machine, long compared with a row
_BLOCK_ROWS = (4, 32)
_MAX_PASSES = 16


@dataclass(frozen=True)
class Rounds:
    """Result of interleaved timing.

    Attributes:
        samples_ms: Time of every row of the variant, in milliseconds.
        ratios: Baseline time divided by variant time on the same rows, one per round.
    """

    samples_ms: tuple[float, ...]
    ratios: tuple[float, ...]


def sample_rows(count: int, among: int, *, seed: int = 0) -> list[int]:
    """Draw row indices at random without replacement.

    Args:
        count: Number of indices; at most `among` are returned.
        among: Number of rows to draw from.
        seed: Random seed.
    """
    picks = np.random.default_rng(seed).permutation(among)[:count]
    return [int(index) for index in picks]


def at_least(indices: Sequence[int], count: int) -> list[int]:
    """Repeat row indices until there are `count` or more."""
    return list(indices) * math.ceil(count / len(indices))


def warm_up(worker: Worker, indices: Sequence[int]) -> float:
    """Run every row once, then time a second run; return its median per row, in seconds.

    Runtimes with dynamic shapes have a one-time cost for each new length.
    """
    worker.time(indices)
    return statistics.median(worker.time(indices[: _BLOCK_ROWS[1]])) / 1e9


def interleave(
    variant: Worker, baseline: Worker, indices: Sequence[int], *, seconds: float
) -> Rounds:
    """Time the variant against the baseline in alternating blocks of rows.

    Each round runs a block of rows on both sides. The order alternates between rounds, to cancel
    effects of the previous block on caches. A faster variant repeats its block up to
    `_MAX_PASSES` times, so that both sides of the ratio take a similar time.

    Args:
        variant: Worker with the rows loaded, not warmed up.
        baseline: Another worker with the same rows, warmed up on `indices`.
        indices: Rows to time.
        seconds: Time budget; at least `MIN_ROUNDS` rounds are run.
    """
    variant_s = warm_up(variant, indices)
    baseline_s = statistics.median(baseline.time(indices[: _BLOCK_ROWS[0]])) / 1e9
    min_rows, max_rows = _BLOCK_ROWS
    block_s = min(_BLOCK_S, seconds / (2 * MIN_ROUNDS))
    size = min(max(round(block_s / baseline_s), min_rows), max_rows, len(indices))
    passes = min(max(round(baseline_s / variant_s), 1), _MAX_PASSES)
    samples: list[float] = []
    ratios: list[float] = []
    end = perf_counter() + seconds
    while len(ratios) < MIN_ROUNDS or (perf_counter() < end and len(ratios) < _MAX_ROUNDS):
        number = len(ratios)
        block = [indices[(number * size + step) % len(indices)] for step in range(size)]
        if number % 2 == 0:
            baseline_ns, variant_ns = baseline.time(block), variant.time(block, passes)
        else:
            variant_ns, baseline_ns = variant.time(block, passes), baseline.time(block)
        ratios.append(sum(baseline_ns) * passes / sum(variant_ns))
        samples += [elapsed / 1e6 for elapsed in variant_ns]
    return Rounds(tuple(samples), tuple(ratios))


def throughput(
    worker: Worker, indices: Sequence[int], *, row_s: float, seconds: float
) -> dict[int, tuple[float, ...]]:
    """Measure rows per second repeatedly at the batch sizes of `BATCH_ROWS`.

    Batch sizes are interleaved, so that a slow phase of the machine affects all of them. The
    largest size is skipped if a warm-up and a timed pass would exceed the budget.

    Args:
        worker: Worker with the rows loaded.
        indices: Rows to use; slow variants use only the first ones.
        row_s: Latency of a single row in seconds, to choose the amount of work.
        seconds: Time budget; at least one repeat of each size is run.
    """
    *smaller, largest = BATCH_ROWS
    sizes = BATCH_ROWS if 2 * largest * row_s <= seconds else tuple(smaller)
    rows = indices[: _row_count(sizes, row_s, seconds)]
    end = perf_counter() + seconds
    for size in sizes:
        worker.batch(rows, size)
    return _rates(worker, rows, sizes, end)


def gpu_throughput(
    worker: Worker, indices: Sequence[int], *, seconds: float
) -> dict[int, tuple[float, ...]]:
    """Measure rows per second as `throughput` does, at the batch sizes of `GPU_BATCH_ROWS`.

    A GPU takes about as long for one row as for many, so the amount of work follows from its
    largest batch. Sizes for which its memory is too small are left out.

    Args:
        worker: Worker with the rows loaded.
        indices: Rows to use, more than once if they do not fill two of the largest batches.
        seconds: Time budget; at least one repeat of each size is run.

    Raises:
        VariantError: The smallest batch fails.
    """
    indices = at_least(indices, 2 * GPU_BATCH_ROWS[-1])
    end = perf_counter() + seconds
    sizes: list[int] = []
    row_s = math.inf
    for size in GPU_BATCH_ROWS:
        try:
            worker.batch(indices[:size], size)
            row_s = worker.batch(indices[:size], size) / 1e9 / size
        except VariantError:
            if not sizes or not worker.alive:
                raise
            break
        sizes.append(size)
    return _rates(worker, indices[: _row_count(sizes, row_s, seconds)], sizes, end)


def _row_count(sizes: Sequence[int], row_s: float, seconds: float) -> int:
    """Rows of a pass, so that all sizes are repeated within the time; at least one batch."""
    share = seconds / (len(sizes) * (_REPEATS + 1))
    return max(round(share / row_s), sizes[-1])


def _rates(
    worker: Worker, rows: Sequence[int], sizes: Sequence[int], end: float
) -> dict[int, tuple[float, ...]]:
    """Rows per second of each size, which is warm, repeated until `end`."""
    rates: dict[int, list[float]] = {size: [] for size in sizes}
    for repeat in range(2 * _REPEATS):
        if repeat and perf_counter() > end:
            break
        for size in sizes:
            rates[size].append(len(rows) * 1e9 / worker.batch(rows, size))
    return {size: tuple(samples) for size, samples in rates.items()}
