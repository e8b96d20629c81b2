"""Export many variants, two child processes at a time; a crash costs a row, not the run.

A child (`export`) exports one variant after the other, because starting it takes as long as an
export.
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

from mlflow_pt_deploy import child, interrupt
from mlflow_pt_deploy.data.splits import Splits
from mlflow_pt_deploy.errors import ArtifactError, exit_in_words
from mlflow_pt_deploy.hardware import usable_cores
from mlflow_pt_deploy.preprocess import Row, row_to_json
from mlflow_pt_deploy.variants.base import Variant
from mlflow_pt_deploy.variants.folder import verify
from mlflow_pt_deploy.variants.table import VARIANTS, suits, useless

_CALIBRATION_ROWS = 128
_TIMEOUT_S = 1800


@dataclass(frozen=True)
class Built:
    """What became of one variant.

    Attributes:
        name: ``<model>-<runtime>-<precision>``.
        model: First part of the name.
        runtime: Second part.
        precision: Third part.
        folder: Where it is, or None where it could not be built.
        reason: Why it could not.
        seconds: Time the export took; 0 where an earlier one was found intact.
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
    progress: Callable[[Built], None] | None = None,
) -> list[Built]:
    """Export every variant of every model that it suits.

    Variants that an interrupted run left intact in `target` are kept as they are.

    Args:
        models: First part of the variants' names to a Hugging Face folder.
        splits: Rows of `train` calibrate; rows of `validation` become the golden rows.
        target: Folder to create the variants' folders in.
        variants: What to build.
        parallel: Child processes at a time.
        progress: Called with each variant as it is done.

    Returns:
        One entry for each model and variant, in that order; failures carry their reason.
    """
    done: dict[str, Built] = {}
    report = progress or (lambda built: None)

    def note(built: Built) -> None:
        done[built.name] = built
        report(built)

    asked = suited(models, variants)
    wanted: list[tuple[str, Variant]] = []
    for model, variant in asked:
        if early := _without_building(variant, model, models[model], target):
            note(early)
        else:
            wanted.append((model, variant))
    if wanted:
        tasks = deque(sorted(wanted, key=_slow_first))
        job = {"target": str(target), **_rows(splits)}
        _work_off(tasks, models, target, job, min(parallel, len(wanted)), note)
    return [done[variant.name(model)] for model, variant in asked]


def suited(models: Mapping[str, Path], variants: Sequence[Variant]) -> list[tuple[str, Variant]]:
    """Names of models with the variants that suit their kind, in the order given."""
    return [
        (model, variant)
        for model, folder in models.items()
        for variant in variants
        if suits(variant, _model_type(folder))
    ]


def _model_type(folder: Path) -> str:
    """The kind of a model; empty where the child that loads it will say what is wrong."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf8"))
        return str(config["model_type"])
    except (OSError, ValueError, KeyError):
        return ""


def _without_building(variant: Variant, model: str, source: Path, target: Path) -> Built | None:
    if reason := variant.unsupported() or useless(variant, _model_type(source)):
        return _built(variant, model, None, reason)
    folder = target / variant.name(model)
    if folder.exists():
        try:
            verify(folder)
        except ArtifactError:
            return None
        return _built(variant, model, folder)
    return None


def _slow_first(task: tuple[str, Variant]) -> tuple[bool, bool, str]:
    """What compiles, then what calibrates, so that no child is left with a long one at the end."""
    model, variant = task
    return not variant.compiles, not variant.precision.startswith("int8-static"), model


def _rows(splits: Splits) -> dict[str, list[Any]]:
    """As JSON: rows for tracing (mixed lengths), calibration and golden answers."""
    train = splits.train.rows
    by_length = sorted(range(len(train)), key=lambda row: len(train[row]))
    random = np.random.default_rng(0)
    chosen = random.permutation(len(train))[:_CALIBRATION_ROWS]
    example = [train[by_length[int(share * (len(train) - 1))]] for share in (0.05, 0.5, 0.9)]
    rows = {
        "example": example,
        "calibration": [train[i] for i in chosen],
        "golden": golden_rows(splits),
    }
    return {use: [row_to_json(row) for row in found] for use, found in rows.items()}


def golden_rows(splits: Splits) -> list[Row]:
    """A few rows of all lengths, whose answers are kept with each variant."""
    rows = sorted(splits.validation.rows, key=len)
    return rows[:: max(1, len(rows) // 6)][:6]


def _built(
    variant: Variant, model: str, folder: Path | None, reason: str = "", seconds: float = 0.0
) -> Built:
    name = variant.name(model)
    return Built(name, model, variant.runtime, variant.precision, folder, reason, seconds)


def _work_off(
    tasks: deque[tuple[str, Variant]],
    models: Mapping[str, Path],
    target: Path,
    job: Mapping[str, Any],
    parallel: int,
    note: Callable[[Built], None],
) -> None:
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(parallel) as pool:
        path, threads = Path(scratch) / "job.json", max(1, usable_cores() // parallel)
        path.write_text(json.dumps(job), encoding="utf8")
        exporters = [
            _Exporter(path, Path(scratch) / f"log{number}", threads) for number in range(parallel)
        ]
        try:
            for done in [
                pool.submit(one.work_off, tasks, models, target, note) for one in exporters
            ]:
                done.result()
        except BaseException:
            tasks.clear()
            for one in exporters:
                one.kill()
            raise


class _Exporter:
    """A child process that exports one variant after the other; the next one replaces a dead one.

    Args:
        job: File with what all exports share.
        log: File for what the child says besides its answers.
        threads: Cores that it may use.
    """

    def __init__(self, job: Path, log: Path, threads: int) -> None:
        self._command = child.command("variants.export", str(job))
        self._log = log
        # Two children with all cores each would wait for one another at every OpenMP barrier; and
        # OpenVINO and NNCF send usage statistics to their makers unless they believe to be in CI.
        self._environment = child.environment(OMP_NUM_THREADS=str(threads), CI="true")
        self._child: subprocess.Popen[str] | None = None

    def work_off(
        self,
        tasks: deque[tuple[str, Variant]],
        models: Mapping[str, Path],
        target: Path,
        note: Callable[[Built], None],
    ) -> None:
        """Take tasks until there are none left; each is noted, whatever happens."""
        try:
            while True:
                try:
                    model, variant = tasks.popleft()
                except IndexError:
                    return
                interrupt.check()
                reason, seconds = self._export(model, models[model], variant)
                interrupt.check()  # a child that was ended for that reason is no failure
                folder = None if reason else target / variant.name(model)
                note(_built(variant, model, folder, reason, seconds))
        finally:
            self.kill()

    def kill(self) -> None:
        """End the child, whatever it is doing."""
        running, self._child = self._child, None
        if running is not None:
            child.end(running)

    def _export(self, model: str, source: Path, variant: Variant) -> tuple[str, float]:
        """Why it failed, empty if it did not, and the seconds it took."""
        running = self._child = self._child or self._start()
        assert running.stdin is not None and running.stdout is not None
        task = {"model": model, "source": str(source), "runtime": variant.runtime}
        late = threading.Event()

        def give_up() -> None:
            late.set()
            child.kill(running)

        timer = threading.Timer(_TIMEOUT_S, give_up)
        timer.start()
        try:
            with suppress(OSError):  # it died: what it said last is read below
                running.stdin.write(json.dumps({**task, "options": asdict(variant)}) + "\n")
                running.stdin.flush()
            line = running.stdout.readline()
        finally:
            timer.cancel()
        if line.endswith("\n"):
            answer = json.loads(line)
            return answer["reason"], answer["seconds"]
        code = running.wait()
        self.kill()
        if late.is_set():
            return f"the export was given up after {_TIMEOUT_S} s", 0.0
        return _cause(code, self._log), 0.0

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


def _cause(code: int, log: Path) -> str:
    how = exit_in_words(code, "; the machine may have run out of memory")
    last = log.read_text(encoding="utf8", errors="replace").strip().splitlines()[-1:]
    return f"the export {how}: {last[0]}" if code > 0 and last else f"the export {how}"
