"""Benchmark variants: load each in a fresh process, time it, then predict all rows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import MappingProxyType

from mlflow_pt_deploy.artifacts.manifest import read_manifest
from mlflow_pt_deploy.data.perturbation import perturb
from mlflow_pt_deploy.data.splits import Splits
from mlflow_pt_deploy.errors import ArtifactError, PtDeployError, VariantError
from mlflow_pt_deploy.evaluation.baseline import Baseline, start_baseline
from mlflow_pt_deploy.evaluation.gpu_state import GpuState
from mlflow_pt_deploy.evaluation.one_variant import measure_one, predict_all
from mlflow_pt_deploy.evaluation.result import Result
from mlflow_pt_deploy.evaluation.timing import sample_rows
from mlflow_pt_deploy.evaluation.worker_client import Worker
from mlflow_pt_deploy.system import interrupt
from mlflow_pt_deploy.system.device import CPU, CUDA
from mlflow_pt_deploy.system.hardware import usable_cores

_BATCHED_ROWS = 4096
_MATES_ROWS = 128


class Bench:
    """Measures variants against baselines that stay warm in processes of their own.

    A context manager. Each folder runs on the device that its manifest names. A baseline is started
    when the first variant needs it; if its process dies, e.g. of memory, it is restarted and the
    current variant is measured again.

    Args:
        baseline: Folder of the eager fp32 teacher: the reference of accuracy and agreement, and of
            the times of all variants whose device is not in `device_baselines`.
        splits: Rows to time (drawn from `validation`) and to predict (`validation`, `test`).
        seconds: Timing budget per variant. Slow models exceed it, because a minimum of rounds and
            repeats is always run. The prediction of all rows is not included.
        threads: Threads per call of the baseline; 0 uses all cores available to this process.
        device_baselines: Kind of device, ``cuda``, to the folder that variants on it are timed
            against.
        gpu: GPU of the variants that were built for one: ``cuda`` or ``cuda:N``.

    Attributes:
        gpu_state: What is known of the GPU, after a variant was measured on it.
        reference: Labels of the baseline, by dataset.
        batched, mates: Rows for throughput, and for the batch's influence on labels.
        perturbed: Perturbed rows by kind.

    Raises:
        VariantError: The baseline fails, or there are no rows.
    """

    def __init__(
        self,
        baseline: Path,
        splits: Splits,
        *,
        seconds: float = 8.0,
        threads: int = 0,
        device_baselines: Mapping[str, Path] = MappingProxyType({}),
        gpu: str = CUDA,
    ) -> None:
        if not len(splits.validation):
            raise VariantError(f"{splits.name} has no validation rows: there is nothing to time.")
        self.splits, self.seconds = splits, seconds
        self._folder, self._device_baselines, self._gpu = baseline, device_baselines, gpu
        self._threads = threads or usable_cores()
        self.batched = sample_rows(_BATCHED_ROWS, len(splits.validation), seed=1)
        self.mates = sample_rows(_MATES_ROWS, len(splits.validation), seed=2)
        self.perturbed = perturb(splits.validation.rows)
        self.gpu_state = GpuState()
        self._warm: dict[Path, Baseline] = {}
        try:
            predictions = predict_all(self.baseline(baseline).worker, self)
        except BaseException:
            self.__exit__()
            raise
        self.reference = {name: each.labels for name, each in predictions.items()}

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        for each in self._warm.values():
            each.worker.close()

    @property
    def worker(self) -> Worker:
        """Process of the baseline."""
        return self._warm[self._folder].worker

    @property
    def pids(self) -> set[int]:
        """Processes of all baselines."""
        return {each.worker.pid for each in self._warm.values()}

    def measure(
        self,
        folders: Mapping[str, Path],
        *,
        threads: int = 0,
        progress: Callable[[Result], None] | None = None,
    ) -> list[Result]:
        """Measure variants in sequence.

        Args:
            folders: Maps variant name to folder. May include the baselines: their `speedup` shows
                the noise floor of their device and should be close to 1.
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
            if self._close_dead():
                self.baseline(self._folder)
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

    def start(self, folder: Path, device: str, threads: int = 0) -> Worker:
        """Start a process with all rows loaded.

        Args:
            folder: Folder of a variant.
            device: ``cpu`` or ``cuda``.
            threads: See `measure`.
        """
        device, threads = CPU if device == CPU else self._gpu, threads or self._threads
        worker = Worker(folder, self.splits.validation.rows[0], device=device, threads=threads)
        perturbed = tuple(chain.from_iterable(self.perturbed.values()))
        try:
            worker.load_rows(self.splits.validation.rows + self.splits.test.rows + perturbed)
        except BaseException:
            worker.close()
            raise
        return worker

    def baseline(self, folder: Path) -> Baseline:
        """Return a warm baseline, started if necessary.

        Raises:
            VariantError: It fails.
        """
        if folder not in self._warm:
            reference = None if folder == self._folder else self.baseline(self._folder)
            try:
                worker = self.start(folder, built_for(folder))
                rows = len(self.splits.validation)
                self._warm[folder] = start_baseline(worker, rows, self.seconds, reference)
            except PtDeployError as error:
                raise VariantError(f"the baseline cannot be measured: {error}") from error
        return self._warm[folder]

    def baseline_for(self, device: str) -> Baseline:
        """Return the baseline that variants on a device are timed against."""
        return self.baseline(self._device_baselines.get(device, self._folder))

    def _close_dead(self) -> bool:
        """Forget baselines whose processes have died; return whether there are any."""
        dead = [folder for folder, each in self._warm.items() if not each.worker.alive]
        for folder in dead:
            self._warm.pop(folder).worker.close()
        return bool(dead)

    def _attempt(self, blank: Result, folder: Path) -> Result:
        try:
            return measure_one(blank, folder, self)
        except PtDeployError as error:
            return replace(blank, reason=str(error))

    def _blank(self, name: str, folder: Path | None, threads: int, reason: str = "") -> Result:
        on_gpu = name.removesuffix(f"-{CUDA}")
        model, _, rest = on_gpu.partition("-")
        runtime, _, precision = rest.partition("-")
        device = CUDA if on_gpu != name else CPU
        return Result(
            name,
            model,
            runtime,
            precision,
            device if folder is None else built_for(folder, device),
            threads,
            folder,
            reason,
            baseline=self._folder.name,
        )


def built_for(folder: Path, default: str = CPU) -> str:
    """Return the kind of device that a variant was built for; a default if that cannot be read."""
    try:
        return read_manifest(folder).device
    except ArtifactError:  # loading it will say why
        return default


def measure(
    folders: Mapping[str, Path],
    *,
    baseline: str,
    splits: Splits,
    seconds: float = 8.0,
    threads: int = 0,
    only: Collection[str] = (),
) -> list[Result]:
    """Measure variants against one of them, see `Bench`.

    Args:
        folders: Maps variant name to folder, including the baseline.
        baseline: Name of the eager fp32 teacher.
        splits: Rows and targets.
        seconds: Timing budget per variant.
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
    with Bench(folders[baseline], splits, seconds=seconds, threads=threads) as bench:
        return bench.measure(selected)
