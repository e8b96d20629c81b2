"""Measure one variant in a process of its own: timing, quality, memory."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mlflow_pt_deploy.evaluation.baseline import Baseline
from mlflow_pt_deploy.evaluation.chance import chance_note
from mlflow_pt_deploy.evaluation.on_gpu import GpuWatch, gpu_measurements
from mlflow_pt_deploy.evaluation.profile import RowCounts
from mlflow_pt_deploy.evaluation.quality import measurement, perturbed_agreement, quality
from mlflow_pt_deploy.evaluation.result import Measurement, Result
from mlflow_pt_deploy.evaluation.statistics import paired_speedup, percentile, product
from mlflow_pt_deploy.evaluation.timing import (
    LATENCY_SHARE,
    gpu_throughput,
    interleave,
    throughput,
)
from mlflow_pt_deploy.evaluation.worker_client import Predictions, Worker
from mlflow_pt_deploy.system.device import CPU

if TYPE_CHECKING:
    from mlflow_pt_deploy.evaluation.bench import Bench

_MATES = 8  # rows of a batch of random others
_PERTURBED = "perturbed"


def predict_all(worker: Worker, bench: Bench) -> dict[str, Predictions]:
    """Return the predictions of the validation, test and perturbed rows."""
    sizes = {
        "validation": len(bench.splits.validation),
        "test": len(bench.splits.test),
        _PERTURBED: sum(map(len, bench.perturbed.values())),
    }
    ends = dict(zip(sizes, accumulate(sizes.values()), strict=True))
    return {name: worker.predict(ends[name] - size, ends[name]) for name, size in sizes.items()}


def measure_one(blank: Result, folder: Path, bench: Bench) -> Result:
    """Measure a variant.

    Args:
        blank: Its result without measurements.
        folder: Its folder.
        bench: Rows, baselines and budget.

    Raises:
        VariantError: It cannot be loaded or fails, or its baseline does.
    """
    baseline = bench.baseline_for(blank.device)
    with bench.start(folder, blank.device, blank.threads) as worker:
        if blank.device == CPU:
            return _measured(blank, folder, worker, baseline, bench)
        watch = GpuWatch(baseline.gpu)
        result = _measured(blank, folder, worker, baseline, bench)
        bench.gpu_state = watch.before
        return watch.finish(result, worker, bench.batched, bench.pids)


def _measured(
    blank: Result, folder: Path, worker: Worker, baseline: Baseline, bench: Bench
) -> Result:
    timing, predictions = _timing(worker, baseline, blank, bench), predict_all(worker, bench)
    validation, labels = bench.splits.validation, bench.splits.labels
    perturbed = {kind: len(some) for kind, some in bench.perturbed.items()}
    note = chance_note(validation.targets, predictions["validation"].labels, labels)
    measurements = [
        *timing,
        measurement("artifact_mb", _folder_bytes(folder) / 1e6),
        measurement("load_s", worker.load_s),
        *quality(predictions, bench.splits, bench.reference),
        *perturbed_agreement(
            predictions[_PERTURBED].labels, bench.reference[_PERTURBED], perturbed
        ),
        measurement("batch_invariance", _batch_invariance(worker, bench)),
        measurement("peak_rss_mb", worker.memory() / 1e6),
    ]
    return replace(
        blank,
        model=worker.model,
        runtime=worker.runtime,
        precision=worker.precision,
        measurements=tuple(measurements),
        notes=(note,) if note else (),
        predicted={
            name: tuple(predictions[name].labels.tolist()) for name in ("validation", "test")
        },
        profile=_profile(worker, predictions["validation"], len(labels)),
    )


def _profile(worker: Worker, predictions: Predictions, classes: int) -> RowCounts:
    """Counts of the validation rows; asked last, because it takes memory."""
    counts = worker.tokens(0, len(predictions.labels))
    counts.labels = [0] * classes
    scores = np.nan_to_num(predictions.confidence).tolist()
    counts.count_rows(zip(predictions.labels.tolist(), scores, strict=True), ())
    return counts


def _timing(worker: Worker, baseline: Baseline, blank: Result, bench: Bench) -> list[Measurement]:
    seconds = bench.seconds * LATENCY_SHARE
    rounds = interleave(worker, baseline.worker, baseline.timed, seconds=seconds)
    p50, p95, p99 = (percentile(rounds.samples_ms, q) for q in (50, 95, 99))
    speedup = paired_speedup(rounds.ratios)
    value, low, high = speedup
    rest = bench.seconds - seconds
    if blank.device == CPU:
        rates = throughput(worker, bench.batched, row_s=p50 / 1e3, seconds=rest)
    else:
        rates = gpu_throughput(worker, bench.batched, seconds=rest)
    best = max(rates, key=lambda size: float(np.median(rates[size])))
    found = [
        measurement("latency_mean_ms", float(np.mean(rounds.samples_ms))),
        Measurement("latency_p50_ms", p50, "ms", samples=rounds.samples_ms),
        measurement("latency_p95_ms", p95),
        measurement("latency_p99_ms", p99),
        Measurement("speedup", value, "x", low=low, high=high, samples=rounds.ratios),
        Measurement.from_samples("throughput_rows_per_s", rates[best], "rows/s"),
        measurement("best_batch_rows", best),
    ]
    if baseline.over_reference is not None:
        value, low, high = product(speedup, baseline.over_reference)
        found.append(Measurement("speedup_over_cpu", value, "x", low=low, high=high))
    if blank.device != CPU:
        found += gpu_measurements(worker, baseline.timed, bench.batched, best, baseline.gpu)
    return found


def _batch_invariance(worker: Worker, bench: Bench) -> float:
    """Share of rows that get the same label alone and in a batch of random others."""
    return 1 - worker.alone(bench.mates, _MATES) / len(bench.mates)


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
