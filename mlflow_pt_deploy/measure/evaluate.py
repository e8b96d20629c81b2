"""The straight line: every variant in a fresh process, timed, then asked about all rows.

Knows what is measured and in which order; does not know who chooses from it, nor MLflow.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mlflow_pt_deploy.data.splits import Split, Splits
from mlflow_pt_deploy.errors import PtDeployError, VariantError
from mlflow_pt_deploy.hardware import usable_cores
from mlflow_pt_deploy.measure.process import Answers, Worker
from mlflow_pt_deploy.measure.result import UNITS, Measurement, Result
from mlflow_pt_deploy.measure.statistics import macro_f1, paired_drop, paired_speedup, percentile
from mlflow_pt_deploy.measure.timing import draw_rows, interleave, throughput, warm

_TIMED_ROWS = (16, 256)
_BATCHED_ROWS = 4096
_LATENCY_SHARE = 0.6  # of the time budget; throughput gets the rest
_WARM_SHARE = 0.25  # of it, for meeting each timed row once


@dataclass(frozen=True)
class _Bench:
    """What every variant is measured against, and how.

    Attributes:
        worker: The baseline's persistent process, warm on `timed`.
        splits: Where rows and targets come from.
        reference: The baseline's answers, int64 (rows,), for each dataset.
        timed: Indices of the rows to time one at a time.
        batched: Indices of the rows for throughput.
    """

    worker: Worker
    splits: Splits
    reference: Mapping[str, npt.NDArray[np.int64]]
    timed: list[int]
    batched: list[int]
    seconds: float


def measure(
    folders: Mapping[str, Path],
    *,
    baseline: str,
    splits: Splits,
    seconds: float = 8.0,
    device: str = "cpu",
    threads: int = 0,
    baseline_threads: int = 0,
    only: Collection[str] = (),
    progress: Callable[[Result], None] | None = None,
) -> list[Result]:
    """Measure variants one after the other, each against the baseline, nothing else running.

    The baseline is measured too, in a second process of its own: its `speedup` is the noise
    floor and should come out at 1.

    Args:
        folders: Variant name to its folder, the baseline among them.
        baseline: Name of the eager fp32 teacher.
        splits: Rows to time (drawn from `validation`) and to answer (`validation`, `test`).
        seconds: Timing budget for each variant; slow models exceed it, because a few rounds and
            repeats are run in any case, and answering all rows comes on top.
        device: ``cpu`` or ``cuda``.
        threads: Threads that one call may use; 0 takes every core this process may run on.
        baseline_threads: The same for the baseline, where it differs.
        only: Names to measure; empty: all.
        progress: Called with each result as it is there.

    Returns:
        A result for each of them, in the order of the folders; one that failed says so in `reason`.

    Raises:
        VariantError: The baseline is not among the folders, fails, or there are no rows.
    """
    if baseline not in folders:
        raise VariantError(
            f"the baseline {baseline} is not among the variants: {', '.join(folders) or 'none'}. "
            "Build it first; every comparison needs it."
        )
    if not len(splits.validation):
        raise VariantError(f"{splits.name} has no validation rows, so there is nothing to time.")
    threads = threads or usable_cores()
    results = []
    theirs = baseline_threads or threads
    with _open_bench(folders[baseline], splits, seconds, device, theirs) as bench:
        for name, folder in folders.items():
            if only and name not in only:
                continue
            blank = _blank(name, folder, device, threads, baseline)
            try:
                result = _measure_one(blank, folder, bench)
            except PtDeployError as error:
                if name == baseline or not bench.worker.alive:
                    raise VariantError(f"the baseline cannot be measured: {error}") from error
                result = replace(blank, reason=str(error))
            results.append(result)
            if progress is not None:
                progress(result)
    return results


def _blank(name: str, folder: Path, device: str, threads: int, baseline: str) -> Result:
    model, _, rest = name.partition("-")
    runtime, _, precision = rest.partition("-")
    return Result(name, model, runtime, precision, device, threads, folder, baseline=baseline)


@contextmanager
def _open_bench(
    folder: Path, splits: Splits, seconds: float, device: str, threads: int
) -> Iterator[_Bench]:
    with _start(folder, splits, device, threads) as worker:
        fewest, most = _TIMED_ROWS
        row_s = warm(worker, draw_rows(fewest, len(splits.validation)))
        timed = draw_rows(
            min(max(round(_WARM_SHARE * seconds / row_s), fewest), most), len(splits.validation)
        )
        batched = draw_rows(_BATCHED_ROWS, len(splits.validation), seed=1)
        worker.time(timed)
        reference = {name: given.labels for name, given in _answers(worker, splits).items()}
        yield _Bench(worker, splits, reference, timed, batched, seconds)


def _start(folder: Path, splits: Splits, device: str, threads: int) -> Worker:
    worker = Worker(folder, splits.validation.rows[0], device=device, threads=threads)
    try:
        worker.load_rows(splits.validation.rows + splits.test.rows)
    except BaseException:
        worker.close()
        raise
    return worker


def _answers(worker: Worker, splits: Splits) -> dict[str, Answers]:
    middle = len(splits.validation)
    return {
        "validation": worker.predict(0, middle),
        "test": worker.predict(middle, middle + len(splits.test)),
    }


def _measure_one(blank: Result, folder: Path, bench: _Bench) -> Result:
    with _start(folder, bench.splits, blank.device, blank.threads) as worker:
        measurements = [
            *_timing(worker, bench),
            _plain("artifact_mb", _folder_bytes(folder) / 1e6),
            _plain("load_s", worker.load_s),
            *_quality(worker, bench),
            _plain("peak_rss_mb", worker.memory() / 1e6),
        ]
        return replace(
            blank,
            model=worker.model,
            runtime=worker.runtime,
            precision=worker.precision,
            measurements=tuple(measurements),
        )


def _timing(worker: Worker, bench: _Bench) -> list[Measurement]:
    rounds = interleave(worker, bench.worker, bench.timed, seconds=bench.seconds * _LATENCY_SHARE)
    p50, p95, p99 = (percentile(rounds.samples_ms, q) for q in (50, 95, 99))
    ratio, low, high = paired_speedup(rounds.ratios)
    rates = throughput(
        worker, bench.batched, row_s=p50 / 1e3, seconds=bench.seconds * (1 - _LATENCY_SHARE)
    )
    best = max(rates, key=lambda size: float(np.median(rates[size])))
    return [
        _plain("latency_mean_ms", float(np.mean(rounds.samples_ms))),
        Measurement("latency_p50_ms", p50, "ms", samples=rounds.samples_ms),
        _plain("latency_p95_ms", p95),
        _plain("latency_p99_ms", p99),
        Measurement("speedup", ratio, "x", low=low, high=high, samples=rounds.ratios),
        Measurement.from_samples("throughput_rows_per_s", rates[best], "rows/s"),
        _plain("best_batch_rows", best),
    ]


def _quality(worker: Worker, bench: _Bench) -> list[Measurement]:
    found: list[Measurement] = []
    for dataset, given in _answers(worker, bench.splits).items():
        split: Split = getattr(bench.splits, dataset)
        if len(split):
            found += _scores(dataset, split.targets, given.labels, bench.reference[dataset])
            sure = tuple(round(value, 6) for value in given.confidence.tolist())
            mean = float(given.confidence.mean())
            found.append(Measurement("confidence", mean, "fraction", dataset, samples=sure))
    return found


def _scores(
    dataset: str,
    targets: npt.NDArray[np.int64],
    predicted: npt.NDArray[np.int64],
    reference: npt.NDArray[np.int64],
) -> list[Measurement]:
    right = predicted == targets
    drop, low, high = paired_drop(reference == targets, right)
    evidence = tuple(map(float, right))
    return [
        Measurement("accuracy", float(right.mean()), "fraction", dataset, samples=evidence),
        _plain("macro_f1", macro_f1(targets, predicted), dataset),
        _plain("agreement", float((predicted == reference).mean()), dataset),
        Measurement("accuracy_drop", drop, "fraction", dataset, low, high),
    ]


def _plain(name: str, value: float, dataset: str = "") -> Measurement:
    return Measurement(name, float(value), UNITS[name], dataset)


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
