"""Export many variants in parallel child processes; a crash fails one variant, not the run.

A child process (`export_worker`) exports several variants in sequence, because starting a process
takes as long as an export.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlflow_pt_deploy.artifacts.loading import verify
from mlflow_pt_deploy.data.splits import Splits
from mlflow_pt_deploy.errors import ArtifactError, describe_exit
from mlflow_pt_deploy.preprocessing import Row, row_to_json
from mlflow_pt_deploy.runtimes.base import Variant
from mlflow_pt_deploy.runtimes.catalog import VARIANTS, skip_reason, supports
from mlflow_pt_deploy.system import child_process as child
from mlflow_pt_deploy.system import interrupt
from mlflow_pt_deploy.system.hardware import usable_cores

_CALIBRATION_ROWS = 128
_TIMEOUT_S = 1800


@dataclass(frozen=True)
class BuildResult:
    """Outcome of the export of one variant.

    Attributes:
        name: ``<model>-<runtime>-<precision>``.
        model: First part of the name.
        runtime: Second part of the name.
        precision: Third part of the name.
        folder: The variant's folder, or None if the export failed.
        reason: Why the export failed; empty on success.
        seconds: Duration of the export; 0 if an intact earlier export was reused.
    """

    name: str
    model: str
    runtime: str
    precision: str
    folder: Path | None
    reason: str = ""
    seconds: float = 0.0


def build(
    models: Mapping[str, Path],
    splits: Splits,
    target: Path,
    *,
    variants: Sequence[Variant] = VARIANTS,
    parallel: int = 2,
    progress: Callable[[BuildResult], None] | None = None,
) -> list[BuildResult]:
    """Export every supported variant of every model.

    Intact variants in `target`, left by an interrupted run, are reused.

    Args:
        models: Maps the first part of the variant names to a Hugging Face folder.
        splits: Rows of `train` are used for calibration, rows of `validation` as golden rows.
        target: Folder in which the variant folders are created.
        variants: Variants to build.
        parallel: Maximum number of concurrent child processes.
        progress: Callback for each finished variant.

    Returns:
        One result for each model and variant, in that order, failures included.
    """
    done: dict[str, BuildResult] = {}
    report = progress or (lambda result: None)

    def record(result: BuildResult) -> None:
        done[result.name] = result
        report(result)

    pairs = supported_pairs(models, variants)
    to_build: list[tuple[str, Variant]] = []
    for model, variant in pairs:
        if known := _known_result(variant, model, models[model], target):
            record(known)
        else:
            to_build.append((model, variant))
    if to_build:
        tasks = deque(sorted(to_build, key=_slow_first))
        job = {"target": str(target), **_job_rows(splits)}
        _run_export_workers(tasks, models, target, job, min(parallel, len(to_build)), record)
    return [done[variant.name(model)] for model, variant in pairs]


def supported_pairs(
    models: Mapping[str, Path], variants: Sequence[Variant]
) -> list[tuple[str, Variant]]:
    """Return (model name, variant) pairs for which the variant supports the model type."""
    return [
        (model, variant)
        for model, folder in models.items()
        for variant in variants
        if supports(variant, _model_type(folder))
    ]


def _model_type(folder: Path) -> str:
    """Return the model type, or an empty string if the config is unreadable.

    In that case the export worker reports the error when it loads the model.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf8"))
        return str(config["model_type"])
    except (OSError, ValueError, KeyError):
        return ""


def _known_result(variant: Variant, model: str, source: Path, target: Path) -> BuildResult | None:
    """Return the result of an unsupported or already exported variant, else None."""
    if reason := variant.unsupported() or skip_reason(variant, _model_type(source)):
        return _result(variant, model, None, reason)
    folder = target / variant.name(model)
    if folder.exists():
        try:
            verify(folder)
        except ArtifactError:
            return None
        return _result(variant, model, folder)
    return None


def _slow_first(task: tuple[str, Variant]) -> tuple[bool, bool, str]:
    """Sort key: compiling variants first, then calibrating ones, to balance the child processes."""
    model, variant = task
    return not variant.compiles, not variant.precision.startswith("int8-static"), model


def _job_rows(splits: Splits) -> dict[str, list[Any]]:
    """Return rows as JSON for tracing (mixed lengths), calibration and the golden check."""
    train = splits.train.rows
    by_length = sorted(range(len(train)), key=lambda row: len(train[row]))
    random = np.random.default_rng(0)
    picks = random.permutation(len(train))[:_CALIBRATION_ROWS]
    example = [train[by_length[int(share * (len(train) - 1))]] for share in (0.05, 0.5, 0.9)]
    rows = {
        "example": example,
        "calibration": [train[i] for i in picks],
        "golden": golden_rows(splits),
    }
    return {use: [row_to_json(row) for row in selected] for use, selected in rows.items()}


def golden_rows(splits: Splits) -> list[Row]:
    """Select up to six validation rows of different lengths for the golden check."""
    rows = sorted(splits.validation.rows, key=len)
    return rows[:: max(1, len(rows) // 6)][:6]


def _result(
    variant: Variant, model: str, folder: Path | None, reason: str = "", seconds: float = 0.0
) -> BuildResult:
    name = variant.name(model)
    return BuildResult(name, model, variant.runtime, variant.precision, folder, reason, seconds)


def _run_export_workers(
    tasks: deque[tuple[str, Variant]],
    models: Mapping[str, Path],
    target: Path,
    job: Mapping[str, Any],
    parallel: int,
    record: Callable[[BuildResult], None],
) -> None:
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(parallel) as pool:
        path, threads = Path(scratch) / "job.json", max(1, usable_cores() // parallel)
        path.write_text(json.dumps(job), encoding="utf8")
        exporters = [
            _Exporter(path, Path(scratch) / f"log{number}", threads) for number in range(parallel)
        ]
        try:
            futures = [
                pool.submit(exporter.run, tasks, models, target, record) for exporter in exporters
            ]
            for future in futures:
                future.result()
        except BaseException:
            tasks.clear()
            for exporter in exporters:
                exporter.kill()
            raise


class _Exporter:
    """Handle of an export worker process; a process that died is replaced for the next task.

    Args:
        job: JSON file with the settings and rows that all exports share.
        log: File for the standard error of the process.
        threads: Number of OpenMP threads of the process.
    """

    def __init__(self, job: Path, log: Path, threads: int) -> None:
        self._command = child.command("artifacts.export_worker", str(job))
        self._log = log
        # Two processes with all cores each would stall at every OpenMP barrier. CI=true disables
        # the usage statistics of OpenVINO and NNCF.
        self._environment = child.environment(OMP_NUM_THREADS=str(threads), CI="true")
        self._child: subprocess.Popen[str] | None = None

    def run(
        self,
        tasks: deque[tuple[str, Variant]],
        models: Mapping[str, Path],
        target: Path,
        record: Callable[[BuildResult], None],
    ) -> None:
        """Export tasks until the queue is empty; each result is recorded, also a failure."""
        try:
            while True:
                try:
                    model, variant = tasks.popleft()
                except IndexError:
                    return
                interrupt.check()
                reason, seconds = self._export(model, models[model], variant)
                interrupt.check()  # a process killed by an interrupt is not a failed export
                folder = None if reason else target / variant.name(model)
                record(_result(variant, model, folder, reason, seconds))
        finally:
            self.kill()

    def kill(self) -> None:
        """Terminate the process, if there is one."""
        running, self._child = self._child, None
        if running is not None:
            child.end(running)

    def _export(self, model: str, source: Path, variant: Variant) -> tuple[str, float]:
        """Export one variant; return the reason of a failure (else empty) and the seconds."""
        running = self._child = self._child or self._start()
        assert running.stdin is not None and running.stdout is not None
        task = {"model": model, "source": str(source), "runtime": variant.runtime}
        timed_out = threading.Event()

        def abort() -> None:
            timed_out.set()
            child.kill(running)

        timer = threading.Timer(_TIMEOUT_S, abort)
        timer.start()
        try:
            with suppress(OSError):  # the process died; its remaining output is read below
                running.stdin.write(json.dumps({**task, "options": asdict(variant)}) + "\n")
                running.stdin.flush()
            line = running.stdout.readline()
        finally:
            timer.cancel()
        if line.endswith("\n"):
            outcome = json.loads(line)
            return outcome["reason"], outcome["seconds"]
        code = running.wait()
        self.kill()
        if timed_out.is_set():
            return f"the export timed out after {_TIMEOUT_S} s", 0.0
        return _describe_failure(code, self._log), 0.0

    def _start(self) -> subprocess.Popen[str]:
        with self._log.open("wb") as errors:
            return child.start(
                self._command,
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )


def _describe_failure(code: int, log: Path) -> str:
    outcome = describe_exit(code, "; the machine may have run out of memory")
    last = log.read_text(encoding="utf8", errors="replace").strip().splitlines()[-1:]
    return f"the export {outcome}: {last[0]}" if code > 0 and last else f"the export {outcome}"
