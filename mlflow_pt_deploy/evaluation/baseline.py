"""A warm baseline process, one per device, that variants are timed against."""

from __future__ import annotations

from dataclasses import dataclass

from mlflow_pt_deploy.evaluation.statistics import Estimate, paired_speedup
from mlflow_pt_deploy.evaluation.timing import LATENCY_SHARE, interleave, sample_rows, warm_up
from mlflow_pt_deploy.evaluation.worker_client import Worker

_TIMED_ROWS = (16, 256)
_WARM_UP_SHARE = 0.25  # of the time budget, to run each timed row once


@dataclass(frozen=True)
class Baseline:
    """A baseline that is warm.

    Attributes:
        worker: Its process.
        timed: Rows that variants are timed on.
        over_reference: How many times as fast it is as the reference, a baseline on another
            device; None for the reference itself.
        gpu: UUID of its GPU; empty on the CPU, or if it is not known.
    """

    worker: Worker
    timed: list[int]
    over_reference: Estimate | None = None
    gpu: str = ""


def start_baseline(
    worker: Worker, rows: int, seconds: float, reference: Baseline | None
) -> Baseline:
    """Warm a baseline, and time it against the reference, interleaved.

    Args:
        worker: Its process, with the rows loaded; closed if this fails.
        rows: Number of rows that may be timed.
        seconds: Timing budget of a variant.
        reference: Baseline on another device, or None.

    Raises:
        VariantError: The process fails.
    """
    try:
        min_rows, max_rows = _TIMED_ROWS
        row_s = warm_up(worker, sample_rows(min_rows, rows))
        count = min(max(round(_WARM_UP_SHARE * seconds / row_s), min_rows), max_rows)
        timed = sample_rows(count, rows)
        worker.time(timed)
        if reference is None:
            return Baseline(worker, timed, gpu=worker.gpu())
        rounds = interleave(
            worker, reference.worker, reference.timed, seconds=seconds * LATENCY_SHARE
        )
        return Baseline(worker, timed, paired_speedup(rounds.ratios), worker.gpu())
    except BaseException:
        worker.close()
        raise
