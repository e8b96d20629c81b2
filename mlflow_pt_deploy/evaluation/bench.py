"""Benchmark variants: load each in a fresh process, time it, then predict all rows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from itertools import accumulate, chain
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mlflow_pt_deploy.data.perturbation import perturb
from mlflow_pt_deploy.data.splits import Split, Splits
from mlflow_pt_deploy.errors import PtDeployError, VariantError
from mlflow_pt_deploy.evaluation.chance import chance_note
from mlflow_pt_deploy.evaluation.profile import RowCounts
from mlflow_pt_deploy.evaluation.result import UNITS, Measurement, Result
from mlflow_pt_deploy.evaluation.statistics import (
    calibration_error,
    lowest_recall,
    macro_f1,
    mcnemar_p,
    paired_drop,
    paired_ratio,
    paired_speedup,
    percentile,
    proportion,
)
from mlflow_pt_deploy.evaluation.timing import interleave, sample_rows, throughput, warm_up
from mlflow_pt_deploy.evaluation.worker_client import Predictions, Worker
from mlflow_pt_deploy.system import interrupt
from mlflow_pt_deploy.system.hardware import usable_cores

_TIMED_ROWS = (16, 256)
_BATCHED_ROWS = 4096
_MATES_ROWS, _MATES = 128, 8  # rows that are predicted alone and in batches of random others
_LATENCY_SHARE = 0.6  # of the time budget; the rest is for throughput
_WARM_UP_SHARE = 0.25  # of the time budget, to run each timed row once
_PERTURBED = "perturbed"


class Bench:
    """Measures variants against a baseline that stays warm in a process of its own.

    A context manager. If the baseline process dies, e.g. of memory, it is restarted and the
    current variant is measured again.

    Args:
        baseline: Folder of the eager fp32 teacher.
        splits: Rows to time (drawn from `validation`) and to predict (`validation`, `test`).
        seconds: Timing budget per variant. Slow models exceed it, because a minimum of rounds and
            repeats is always run. The prediction of all rows is not included.
        device: ``cpu`` or ``cuda``.
        threads: Threads per call of the baseline; 0 uses all cores available to this process.

    Raises:
        VariantError: The baseline fails, or there are no rows.
    """

    def __init__(
        self,
        baseline: Path,
        splits: Splits,
        *,
        seconds: float = 8.0,
        device: str = "cpu",
        threads: int = 0,
    ) -> None:
        if not len(splits.validation):
            raise VariantError(f"{splits.name} has no validation rows: there is nothing to time.")
        self.splits, self.seconds = splits, seconds
        self._folder, self._device = baseline, device
        self._threads = threads or usable_cores()
        self.batched = sample_rows(_BATCHED_ROWS, len(splits.validation), seed=1)
        self.mates = sample_rows(_MATES_ROWS, len(splits.validation), seed=2)
        self.perturbed = perturb(splits.validation.rows)
        self.worker = self._start_baseline()
        try:
            predictions = _predict_all(self.worker, self)
        except BaseException:
            self.worker.close()
            raise
        self.reference = {name: each.labels for name, each in predictions.items()}

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self.worker.close()

    def measure(
        self,
        folders: Mapping[str, Path],
        *,
        threads: int = 0,
        progress: Callable[[Result], None] | None = None,
    ) -> list[Result]:
        """Measure variants in sequence.

        Args:
            folders: Maps variant name to folder. May include the baseline: its `speedup` shows
                the noise floor and should be close to 1.
            threads: Threads per call; 0 uses the number of the baseline.
            progress: Callback for each result.

        Returns:
            One result per variant, in order; `reason` is set if the variant failed.

        Raises:
            VariantError: The baseline itself cannot be measured.
        """
        results = []
        for name, folder in folders.items():
            interrupt.check()
            blank = self._blank(name, folder, threads or self._threads)
            result = self._attempt(blank, folder)
            if not self.worker.alive:
                self.worker.close()
                self.worker = self._start_baseline()
                result = self._attempt(blank, folder)
            if result.reason and folder == self._folder:
                raise VariantError(f"the baseline cannot be measured: {result.reason}")
            results.append(result)
            if progress is not None:
                progress(result)
        return results

    def failed(self, name: str, reason: str) -> Result:
        """Return the result of a variant that cannot be measured."""
        return self._blank(name, None, self._threads, reason)

    def _attempt(self, blank: Result, folder: Path) -> Result:
        try:
            return _measure_one(blank, folder, self)
        except PtDeployError as error:
            return replace(blank, reason=str(error))

    def _start_baseline(self) -> Worker:
        try:
            worker = _start(self._folder, self, self._device, self._threads)
        except PtDeployError as error:
            raise VariantError(f"the baseline cannot be measured: {error}") from error
        try:
            min_rows, max_rows = _TIMED_ROWS
            rows = len(self.splits.validation)
            row_s = warm_up(worker, sample_rows(min_rows, rows))
            count = min(max(round(_WARM_UP_SHARE * self.seconds / row_s), min_rows), max_rows)
            self.timed = sample_rows(count, rows)
            worker.time(self.timed)
        except BaseException:
            worker.close()
            raise
        return worker

    def _blank(self, name: str, folder: Path | None, threads: int, reason: str = "") -> Result:
        model, _, rest = name.partition("-")
        runtime, _, precision = rest.partition("-")
        return Result(
            name,
            model,
            runtime,
            precision,
            self._device,
            threads,
            folder,
            reason,
            baseline=self._folder.name,
        )


def measure(
    folders: Mapping[str, Path],
    *,
    baseline: str,
    splits: Splits,
    seconds: float = 8.0,
    device: str = "cpu",
    threads: int = 0,
    only: Collection[str] = (),
) -> list[Result]:
    """Measure variants against one of them, see `Bench`.

    Args:
        folders: Maps variant name to folder, including the baseline.
        baseline: Name of the eager fp32 teacher.
        splits: Rows and targets.
        seconds: Timing budget per variant.
        device: ``cpu`` or ``cuda``.
        threads: Threads per call; 0 uses all cores available to this process.
        only: Names of the variants to measure; empty means all.

    Raises:
        VariantError: The baseline is not among the folders, fails, or there are no rows.
    """
    if baseline not in folders:
        raise VariantError(
            f"the baseline {baseline} is not among the variants: {', '.join(folders) or 'none'}. "
            "Build it first; every comparison needs it."
        )
    selected = {name: path for name, path in folders.items() if not only or name in only}
    with Bench(folders[baseline], splits, seconds=seconds, device=device, threads=threads) as bench:
        return bench.measure(selected)


def _start(folder: Path, bench: Bench, device: str, threads: int) -> Worker:
    splits = bench.splits
    worker = Worker(folder, splits.validation.rows[0], device=device, threads=threads)
    perturbed = tuple(chain.from_iterable(bench.perturbed.values()))
    try:
        worker.load_rows(splits.validation.rows + splits.test.rows + perturbed)
    except BaseException:
        worker.close()
        raise
    return worker


def _predict_all(worker: Worker, bench: Bench) -> dict[str, Predictions]:
    """Predictions of the validation, test and perturbed rows."""
    sizes = {
        "validation": len(bench.splits.validation),
        "test": len(bench.splits.test),
        _PERTURBED: sum(map(len, bench.perturbed.values())),
    }
    ends = dict(zip(sizes, accumulate(sizes.values()), strict=True))
    return {name: worker.predict(ends[name] - size, ends[name]) for name, size in sizes.items()}


def _measure_one(blank: Result, folder: Path, bench: Bench) -> Result:
    with _start(folder, bench, blank.device, blank.threads) as worker:
        timing, predictions = _timing(worker, bench), _predict_all(worker, bench)
        validation, labels = bench.splits.validation, bench.splits.labels
        note = chance_note(validation.targets, predictions["validation"].labels, labels)
        measurements = [
            *timing,
            _measurement("artifact_mb", _folder_bytes(folder) / 1e6),
            _measurement("load_s", worker.load_s),
            *_quality(predictions, bench),
            *_perturbed_agreement(predictions[_PERTURBED], bench),
            _measurement("batch_invariance", _batch_invariance(worker, bench)),
            _measurement("peak_rss_mb", worker.memory() / 1e6),
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


def _timing(worker: Worker, bench: Bench) -> list[Measurement]:
    rounds = interleave(worker, bench.worker, bench.timed, seconds=bench.seconds * _LATENCY_SHARE)
    p50, p95, p99 = (percentile(rounds.samples_ms, q) for q in (50, 95, 99))
    ratio, low, high = paired_speedup(rounds.ratios)
    rates = throughput(
        worker, bench.batched, row_s=p50 / 1e3, seconds=bench.seconds * (1 - _LATENCY_SHARE)
    )
    best = max(rates, key=lambda size: float(np.median(rates[size])))
    return [
        _measurement("latency_mean_ms", float(np.mean(rounds.samples_ms))),
        Measurement("latency_p50_ms", p50, "ms", samples=rounds.samples_ms),
        _measurement("latency_p95_ms", p95),
        _measurement("latency_p99_ms", p99),
        Measurement("speedup", ratio, "x", low=low, high=high, samples=rounds.ratios),
        Measurement.from_samples("throughput_rows_per_s", rates[best], "rows/s"),
        _measurement("best_batch_rows", best),
    ]


def _quality(predictions: Mapping[str, Predictions], bench: Bench) -> list[Measurement]:
    found: list[Measurement] = []
    for dataset in ("validation", "test"):
        labels, confidence = predictions[dataset]
        split: Split = getattr(bench.splits, dataset)
        if len(split):
            found += _scores(dataset, split.targets, labels, bench.reference[dataset])
            error = calibration_error(confidence, labels == split.targets)
            found.append(_measurement("calibration_error", error, dataset))
            samples = tuple(round(value, 6) for value in confidence.tolist())
            mean = float(confidence.mean())
            found.append(Measurement("confidence", mean, "fraction", dataset, samples=samples))
    return found


def _scores(
    dataset: str,
    targets: npt.NDArray[np.int64],
    predicted: npt.NDArray[np.int64],
    reference: npt.NDArray[np.int64],
) -> list[Measurement]:
    correct, expected = predicted == targets, reference == targets
    drop, low, high = paired_drop(expected, correct)
    kept, kept_low = paired_ratio(expected, correct)
    samples = tuple(map(float, correct))
    return [
        Measurement("accuracy", float(correct.mean()), "fraction", dataset, samples=samples),
        _measurement("macro_f1", macro_f1(targets, predicted), dataset),
        _measurement("agreement", float((predicted == reference).mean()), dataset),
        Measurement("accuracy_drop", drop, "fraction", dataset, low, high),
        Measurement("accuracy_kept", kept, "fraction", dataset, kept_low),
        _measurement("mcnemar_p", mcnemar_p(expected, correct), dataset),
        _measurement("class_recall", lowest_recall(targets, predicted), dataset),
    ]


def _perturbed_agreement(predictions: Predictions, bench: Bench) -> list[Measurement]:
    """Agreement with the baseline on the perturbed rows: of all, and of each kind."""
    equal = predictions.labels == bench.reference[_PERTURBED]
    ends = list(accumulate(map(len, bench.perturbed.values())))
    parts = zip(bench.perturbed, np.split(equal, ends[:-1]), strict=True)
    return [
        Measurement("agreement_perturbed", share, "fraction", kind, low, high)
        for kind, part in (("", equal), *parts)
        for share, low, high in [proportion(int(part.sum()), len(part))]
    ]


def _batch_invariance(worker: Worker, bench: Bench) -> float:
    """Share of rows that get the same label alone and in a batch of random others."""
    return 1 - worker.alone(bench.mates, _MATES) / len(bench.mates)


def _measurement(name: str, value: float, dataset: str = "") -> Measurement:
    return Measurement(name, float(value), UNITS[name], dataset)


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
