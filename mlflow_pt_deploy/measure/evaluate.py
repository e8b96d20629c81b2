"""The straight line: every variant in a fresh process, timed, then asked about all rows.

Knows what is measured and in which order; does not know who chooses from it, nor MLflow.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mlflow_pt_deploy import interrupt
from mlflow_pt_deploy.data.splits import Split, Splits
from mlflow_pt_deploy.errors import PtDeployError, VariantError
from mlflow_pt_deploy.hardware import usable_cores
from mlflow_pt_deploy.measure.chance import chance_note
from mlflow_pt_deploy.measure.process import Answers, Worker
from mlflow_pt_deploy.measure.result import UNITS, Measurement, Result
from mlflow_pt_deploy.measure.statistics import macro_f1, paired_drop, paired_speedup, percentile
from mlflow_pt_deploy.measure.timing import draw_rows, interleave, throughput, warm

_TIMED_ROWS = (16, 256)
_BATCHED_ROWS = 4096
_LATENCY_SHARE = 0.6  # of the time budget; throughput gets the rest
_WARM_SHARE = 0.25  # of it, for meeting each timed row once


class Bench:
    """The baseline in a process of its own, warm, and variants measured against it.

    A context manager. A baseline whose process died, for want of memory perhaps, is started again,
    and the variant that was being measured is measured anew.

    Args:
        baseline: Folder of the eager fp32 teacher.
        splits: Rows to time (drawn from `validation`) and to answer (`validation`, `test`).
        seconds: Timing budget for each variant; slow models exceed it, because a few rounds and
            repeats are run in any case, and answering all rows comes on top.
        device: ``cpu`` or ``cuda``.
        threads: Threads that one call of the baseline may use; 0 takes every core this process
            may run on.

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
        self.batched = draw_rows(_BATCHED_ROWS, len(splits.validation), seed=1)
        self.worker = self._start_baseline()
        try:
            given = _answers(self.worker, splits)
        except BaseException:
            self.worker.close()
            raise
        self.reference = {name: answers.labels for name, answers in given.items()}

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
        """Measure variants one after the other, nothing else running.

        Args:
            folders: Variant name to its folder. The baseline may be among them: its `speedup` is
                the noise floor and should come out at 1.
            threads: Threads that one call may use; 0: as the baseline.
            progress: Called with each result as it is there.

        Returns:
            A result for each, in order; one that failed says so in `reason`.

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
        """The row of a variant that cannot be measured."""
        return self._blank(name, None, self._threads, reason)

    def _attempt(self, blank: Result, folder: Path) -> Result:
        try:
            return _measure_one(blank, folder, self)
        except PtDeployError as error:
            return replace(blank, reason=str(error))

    def _start_baseline(self) -> Worker:
        try:
            worker = _start(self._folder, self.splits, self._device, self._threads)
        except PtDeployError as error:
            raise VariantError(f"the baseline cannot be measured: {error}") from error
        try:
            fewest, most = _TIMED_ROWS
            rows = len(self.splits.validation)
            row_s = warm(worker, draw_rows(fewest, rows))
            count = min(max(round(_WARM_SHARE * self.seconds / row_s), fewest), most)
            self.timed = draw_rows(count, rows)
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
        folders: Variant name to its folder, the baseline among them.
        baseline: Name of the eager fp32 teacher.
        splits: Where rows and targets come from.
        seconds: Timing budget for each variant.
        device: ``cpu`` or ``cuda``.
        threads: Threads that one call may use; 0 takes every core this process may run on.
        only: Names to measure; empty: all.

    Raises:
        VariantError: The baseline is not among the folders, fails, or there are no rows.
    """
    if baseline not in folders:
        raise VariantError(
            f"the baseline {baseline} is not among the variants: {', '.join(folders) or 'none'}. "
            "Build it first; every comparison needs it."
        )
    wanted = {name: path for name, path in folders.items() if not only or name in only}
    with Bench(folders[baseline], splits, seconds=seconds, device=device, threads=threads) as bench:
        return bench.measure(wanted)


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


def _measure_one(blank: Result, folder: Path, bench: Bench) -> Result:
    with _start(folder, bench.splits, blank.device, blank.threads) as worker:
        timing, answers = _timing(worker, bench), _answers(worker, bench.splits)
        validation, labels = bench.splits.validation, bench.splits.labels
        note = chance_note(validation.targets, answers["validation"].labels, labels)
        measurements = [
            *timing,
            _plain("artifact_mb", _folder_bytes(folder) / 1e6),
            _plain("load_s", worker.load_s),
            *_quality(answers, bench),
            _plain("peak_rss_mb", worker.memory() / 1e6),
        ]
        return replace(
            blank,
            model=worker.model,
            runtime=worker.runtime,
            precision=worker.precision,
            measurements=tuple(measurements),
            notes=(note,) if note else (),
        )


def _timing(worker: Worker, bench: Bench) -> list[Measurement]:
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


def _quality(answers: Mapping[str, Answers], bench: Bench) -> list[Measurement]:
    found: list[Measurement] = []
    for dataset, given in answers.items():
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
