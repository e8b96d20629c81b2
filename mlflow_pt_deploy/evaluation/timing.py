"""Interleaved timing: a variant and the baseline take turns on the same rows.

Knows workers and clocks; does not know what a variant is worth, nor whether it answers right.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from mlflow_pt_deploy.evaluation.worker_client import Worker

BATCH_ROWS = (8, 32, 128)
LEAST_ROUNDS = 6
_REPEATS = 3
_MOST_ROUNDS = 200
_BLOCK_S = 0.15  # short against the drift of a machine's clock, long against one row
_BLOCK_ROWS = (4, 32)
_MOST_PASSES = 16


@dataclass(frozen=True)
class Rounds:
    """What interleaved rounds gave.

    Attributes:
        samples_ms: Every timed row of the variant.
        ratios: One a round: baseline's time divided by the variant's, on the same rows.
    """

    samples_ms: tuple[float, ...]
    ratios: tuple[float, ...]


def sample_rows(count: int, among: int, *, seed: int = 0) -> list[int]:
    """Draw row indices without replacement, so that lengths come as the data has them.

    Args:
        count: How many; fewer where there are fewer.
        among: Number of rows to draw from.
        seed: For the draw.
    """
    picks = np.random.default_rng(seed).permutation(among)[:count]
    return [int(index) for index in picks]


def warm_up(worker: Worker, indices: Sequence[int]) -> float:
    """Answer every row once and return the median in seconds of a second time.

    A runtime with free shapes pays when it first meets a length; that belongs to no row.
    """
    worker.time(indices)
    return statistics.median(worker.time(indices[: _BLOCK_ROWS[1]])) / 1e9


def interleave(
    variant: Worker, baseline: Worker, indices: Sequence[int], *, seconds: float
) -> Rounds:
    """Time the variant against the baseline, block by block, in turns.

    Each round runs a block of rows on both, and the other one begins in the next round, so that
    neither always finds the machine as the other left it. The faster variant repeats its block,
    up to `_MOST_PASSES` times, so that both sides of the ratio rest on a like time.

    Args:
        variant: Holds the rows, is not warm yet.
        baseline: Another process with the same rows, warm on `indices`.
        indices: The rows to time.
        seconds: When to stop; `LEAST_ROUNDS` are run in any case.
    """
    variant_s = warm_up(variant, indices)
    baseline_s = statistics.median(baseline.time(indices[: _BLOCK_ROWS[0]])) / 1e9
    least, most = _BLOCK_ROWS
    block_s = min(_BLOCK_S, seconds / (2 * LEAST_ROUNDS))  # a short budget gets short blocks
    size = min(max(round(block_s / baseline_s), least), most, len(indices))
    passes = min(max(round(baseline_s / variant_s), 1), _MOST_PASSES)
    samples: list[float] = []
    ratios: list[float] = []
    end = perf_counter() + seconds
    while len(ratios) < LEAST_ROUNDS or (perf_counter() < end and len(ratios) < _MOST_ROUNDS):
        turn = len(ratios)
        block = [indices[(turn * size + step) % len(indices)] for step in range(size)]
        if turn % 2 == 0:
            theirs, ours = baseline.time(block), variant.time(block, passes)
        else:
            ours, theirs = variant.time(block, passes), baseline.time(block)
        ratios.append(sum(theirs) * passes / sum(ours))
        samples += [elapsed / 1e6 for elapsed in ours]
    return Rounds(tuple(samples), tuple(ratios))


def throughput(
    worker: Worker, indices: Sequence[int], *, row_s: float, seconds: float
) -> dict[int, tuple[float, ...]]:
    """Rows a second at the batch sizes of `BATCH_ROWS`, in repeated measurements.

    Batch sizes take turns, so that a slow moment does not fall on one of them alone. The largest
    is left out where a warm and a timed pass of it would take longer than the whole budget.

    Args:
        worker: Holds the rows.
        indices: Rows to draw from, most of them only used where the variant is fast.
        row_s: Seconds that one row takes alone, to size the work.
        seconds: Share of the budget; one repeat of each size is run in any case.
    """
    *smaller, largest = BATCH_ROWS
    sizes = BATCH_ROWS if 2 * largest * row_s <= seconds else tuple(smaller)
    share = seconds / (len(sizes) * (_REPEATS + 1))
    rows = indices[: max(round(share / row_s), sizes[-1])]
    end = perf_counter() + seconds
    for size in sizes:
        worker.batch(rows, size)
    rates: dict[int, list[float]] = {size: [] for size in sizes}
    for repeat in range(2 * _REPEATS):
        if repeat and perf_counter() > end:
            break
        for size in sizes:
            rates[size].append(len(rows) * 1e9 / worker.batch(rows, size))
    return {size: tuple(found) for size, found in rates.items()}
