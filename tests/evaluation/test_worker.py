"""Real worker processes with a tiny ONNX Runtime variant."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
from tiny.votes import PREDICTIONS, ROWS, start_worker

from mlflow_pt_deploy.errors import VariantError
from mlflow_pt_deploy.evaluation import Worker


def test_a_worker_reports_its_variant_and_start_up_time(worker: Worker) -> None:
    assert (worker.model, worker.runtime, worker.precision) == ("teacher", "onnxruntime", "fp32")
    assert 0.05 < worker.load_s < 30


def test_predictions_keep_the_row_order_although_batches_are_sorted(worker: Worker) -> None:
    assert worker.predict(0, 4).labels.tolist() == PREDICTIONS
    assert worker.predict(1, 3).labels.tolist() == PREDICTIONS[1:3]


def test_every_row_of_every_pass_is_timed(worker: Worker) -> None:
    elapsed = worker.time([0, 2, 3], passes=4)
    assert len(elapsed) == 12
    assert min(elapsed) > 0


def test_memory_is_that_of_the_worker_process(folder: Path) -> None:
    ballast = np.ones(40_000_000)  # 320 MB in this process, not in the worker
    with start_worker(folder) as worker:
        assert 20e6 < worker.memory() < 160e6
    assert ballast.nbytes == 320e6


def test_a_worker_imports_neither_torch_nor_transformers(worker: Worker) -> None:
    maps = Path(f"/proc/{worker.pid}/maps")
    if not maps.exists():
        pytest.skip("needs Linux's /proc")
    assert "onnxruntime" in maps.read_text()
    assert "libtorch" not in maps.read_text()


def test_thread_variables_are_set_for_every_runtime(worker: Worker) -> None:
    environ = Path(f"/proc/{worker.pid}/environ")
    if not environ.exists():
        pytest.skip("needs Linux's /proc")
    assert {b"OMP_NUM_THREADS=1", b"RAYON_NUM_THREADS=1"} <= set(environ.read_bytes().split(b"\0"))


def test_an_error_of_the_variant_is_reported_and_the_worker_continues(worker: Worker) -> None:
    with pytest.raises(VariantError, match="teacher-onnxruntime-fp32: IndexError: list index"):
        worker.time([99])
    assert worker.predict(0, 1).labels.tolist() == [0]


def test_a_variant_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(VariantError, match="nothing-here-fp32 is not a variant"):
        Worker(tmp_path / "nothing-here-fp32", ROWS[0])


def test_a_killed_worker_is_reported_and_reaped(folder: Path) -> None:
    with start_worker(folder) as worker:
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(VariantError, match=r"killed \(SIGKILL\), probably out of memory"):
            worker.predict(0, 4)
    with pytest.raises(ProcessLookupError):
        os.kill(worker.pid, 0)


def test_a_crash_is_reported_with_its_signal(folder: Path) -> None:
    with start_worker(folder) as worker:
        os.kill(worker.pid, signal.SIGSEGV)
        with pytest.raises(VariantError, match="crashed with SIGSEGV, during 'predict'"):
            worker.predict(0, 4)


def test_a_hanging_worker_is_killed(folder: Path) -> None:
    with start_worker(folder, timeout_s=5.0) as worker:
        worker._timeout_s = 0.2
        os.kill(worker.pid, signal.SIGSTOP)
        with pytest.raises(VariantError, match=r"no reply to 'predict' within 0\.2 s"):
            worker.predict(0, 4)
    with pytest.raises(ProcessLookupError):
        os.kill(worker.pid, 0)


def test_no_message_contains_a_row(worker: Worker) -> None:
    long = f"cannot take {ROWS[2]!r} here\nsecond line"
    assert worker._lines_without_rows(long) == [
        "(redacted: contains a row of the data)",
        "second line",
    ]
    assert worker._lines_without_rows("bad token 'leaf'")[0].startswith("(redacted")
    assert worker._lines_without_rows("no leaf quoted") == ["no leaf quoted"]
