"""What optimize does beyond building and measuring: the finalists with fewer threads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlflow_pt_deploy import optimize
from mlflow_pt_deploy.data import Splits
from mlflow_pt_deploy.measure import Measurement, Result
from mlflow_pt_deploy.options import Options
from mlflow_pt_deploy.tracking import _served_so

BASELINE = "teacher-eager-fp32"


def _result(variant: str, speedup: float, threads: int = 4) -> Result:
    measurements = (
        Measurement("latency_p50_ms", 10 / speedup, "ms"),
        Measurement("latency_p95_ms", 20 / speedup, "ms"),
        Measurement.from_samples(
            "throughput_rows_per_s", (90 * speedup, 100 * speedup, 110 * speedup), "rows/s"
        ),
        Measurement("best_batch_rows", 32, "rows"),
        Measurement("speedup", speedup, "x", low=0.9 * speedup, high=1.1 * speedup),
        Measurement("artifact_mb", 10, "MB"),
        Measurement("peak_rss_mb", 100, "MB"),
        Measurement("accuracy", 0.9, "fraction", "validation"),
        Measurement("accuracy_drop", 0.0, "fraction", "validation"),
    )
    parts = variant.split("-", 2)
    return Result(variant, *parts, "cpu", threads, Path(variant), "", measurements, BASELINE)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, tuple[str, ...]]]:
    """Four cores; one thread is as good for the static student, and two for the other."""
    calls: list[tuple[int, tuple[str, ...]]] = []
    speedups = {("static-numpy-fp32", 1): 100.0, ("static-numpy-fp32", 2): 95.0}
    speedups |= {("student-openvino-fp32", 1): 5.0, ("student-openvino-fp32", 2): 9.5}

    def measure(folders: Any, *, threads: int, only: Any, **rest: Any) -> list[Result]:
        assert rest["baseline_threads"] == 4  # or speed-ups could not be compared
        assert next(iter(folders)) == rest["baseline"] == BASELINE
        calls.append((threads, tuple(only)))
        return [_result(name, speedups.get((name, threads), 0.5), threads) for name in only]

    monkeypatch.setattr(optimize, "measure", measure)
    monkeypatch.setattr(optimize, "usable_cores", lambda: 4)
    return calls


MEASURED = [
    _result(BASELINE, 1.0),
    _result("static-numpy-fp32", 100.0),
    _result("student-openvino-fp32", 10.0),
]


def test_each_finalist_keeps_as_few_threads_as_it_needs(
    asked: list[tuple[int, tuple[str, ...]]], tiny_splits: Splits
) -> None:
    found = optimize._with_fewer_threads(MEASURED, Path(), tiny_splits, BASELINE, Options())
    assert [threads for threads, _ in asked] == [2, 1]
    assert {each.variant: each.threads for each in found} == {
        BASELINE: 4,
        "static-numpy-fp32": 1,
        "student-openvino-fp32": 2,
    }


def test_threads_that_a_user_sets_stay(
    asked: list[tuple[int, tuple[str, ...]]], tiny_splits: Splits
) -> None:
    options = Options(threads=4)
    found = optimize._with_fewer_threads(MEASURED, Path(), tiny_splits, BASELINE, options)
    assert found == MEASURED
    assert not asked


def test_it_is_served_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlflow_pt_deploy.tracking.usable_cores", lambda: 4)
    assert _served_so(_result("a-b-c", 2, threads=1)) == {"num_threads": 1, "max_batch_rows": 32}
    every_core = _result("a-b-c", 2, threads=4)
    assert _served_so(every_core) == {"max_batch_rows": 32}  # and on other machines all of theirs
    assert _served_so(replace(every_core, measurements=())) == {}
