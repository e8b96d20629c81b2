"""Optimize: the finalists are measured with fewer threads too."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from tiny.gpu import built_for_cuda

from mlflow_pt_deploy.artifacts import verify
from mlflow_pt_deploy.artifacts.builder import BuildResult
from mlflow_pt_deploy.config import Options
from mlflow_pt_deploy.evaluation import Measurement, Result
from mlflow_pt_deploy.pipeline import optimize
from mlflow_pt_deploy.runtimes.base import Variant
from mlflow_pt_deploy.runtimes.catalog import select, wants_portable
from mlflow_pt_deploy.runtimes.eager import Eager
from mlflow_pt_deploy.selection.policy import Policy
from mlflow_pt_deploy.tracking import _serving_config

BenchCalls = tuple[optimize.Bench, list[tuple[int, tuple[str, ...]]]]
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
        Measurement("accuracy_kept", 1.0, "fraction", "validation", low=0.99),
    )
    parts = variant.split("-", 2)
    return Result(variant, *parts, "cpu", threads, Path(variant), "", measurements, BASELINE)


@pytest.fixture
def bench_calls(monkeypatch: pytest.MonkeyPatch) -> BenchCalls:
    """Four cores; one thread is enough for the static student, two for the other."""
    calls: list[tuple[int, tuple[str, ...]]] = []
    speedups = {("static-numpy-fp32", 1): 100.0, ("static-numpy-fp32", 2): 95.0}
    speedups |= {("student-openvino-fp32", 1): 5.0, ("student-openvino-fp32", 2): 9.5}

    class Bench:
        def measure(self, folders: Any, *, threads: int, **_: Any) -> list[Result]:
            calls.append((threads, tuple(folders)))
            return [_result(name, speedups.get((name, threads), 0.5), threads) for name in folders]

    monkeypatch.setattr(optimize, "usable_cores", lambda: 4)
    return cast("optimize.Bench", Bench()), calls


MEASURED = [
    _result(BASELINE, 1.0),
    _result("static-numpy-fp32", 100.0),
    _result("student-openvino-fp32", 10.0),
]


def test_each_finalist_gets_the_fewest_threads_it_needs(bench_calls: BenchCalls) -> None:
    bench, calls = bench_calls
    found = optimize._with_fewer_threads(bench, MEASURED, Options(), Policy())
    assert [threads for threads, _ in calls] == [2, 1]
    assert {each.variant: each.threads for each in found} == {
        BASELINE: 4,
        "static-numpy-fp32": 1,
        "student-openvino-fp32": 2,
    }


def test_threads_set_by_the_user_are_kept(bench_calls: BenchCalls) -> None:
    bench, calls = bench_calls
    assert optimize._with_fewer_threads(bench, MEASURED, Options(threads=4), Policy()) == MEASURED
    assert not calls


def test_a_variant_is_served_with_its_measured_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlflow_pt_deploy.tracking.usable_cores", lambda: 4)
    assert _serving_config(_result("a-b-c", 2, threads=1)) == {
        "num_threads": 1,
        "max_batch_rows": 32,
    }
    every_core = _result("a-b-c", 2, threads=4)
    assert _serving_config(every_core) == {
        "max_batch_rows": 32
    }  # and on other machines all of theirs
    assert _serving_config(replace(every_core, measurements=())) == {}
    assert _serving_config(_result("a-portable-mixed-cuda", 2, threads=1)) == {}


def test_a_portable_variant_is_built_of_two(
    exported: Callable[[Variant], Path], tmp_path: Path
) -> None:
    shutil.copytree(exported(Eager()), tmp_path / BASELINE)
    cuda = built_for_cuda(exported(Eager("fp16")), tmp_path / "teacher-eager-fp16-cuda")
    assert optimize._portable(None, tmp_path) == []
    (built,) = optimize._portable((BASELINE, cuda.name), tmp_path)
    assert (built.name, built.reason) == ("teacher-portable-mixed-cuda", "")
    assert (built.model, built.runtime, built.precision) == ("teacher", "portable", "mixed")
    assert built.folder is not None and verify(built.folder).options["cuda"] == cuda.name
    (failed,) = optimize._portable((BASELINE, BASELINE), tmp_path)
    assert failed.folder is None and "was built for device=cpu" in failed.reason


@pytest.mark.parametrize(
    ("names", "wanted"),
    [("", True), ("portable", True), ("eager, portable", True), ("eager", False)],
)
def test_portable_variants_by_name(names: str, wanted: bool) -> None:
    assert wants_portable(names) == wanted
    assert Eager() in select(names)


def test_a_variant_of_a_gpu_is_served_in_batches_that_fill_it() -> None:
    gpu = _result("teacher-eager-bf16-cuda", 2)
    batches = (
        Measurement("best_batch_rows", 512, "rows"),
        Measurement("best_batch_tokens", 40_000, "tokens"),
    )
    kept = tuple(each for each in gpu.measurements if each.name != "best_batch_rows")
    config = _serving_config(replace(gpu, measurements=(*kept, *batches)))
    config.pop("num_threads", None)
    assert config == {"max_batch_rows": 512, "max_batch_tokens": 40_000, "queue_rows": 2048}


def test_a_gpu_adds_its_variants_and_their_baseline() -> None:
    def names(**options: str) -> list[str]:
        return [each.name("teacher") for each in optimize._variants(Options(**options))]

    assert not any(name.endswith("-cuda") for name in names(device="cpu"))
    every = names(device="cuda:1")
    assert {BASELINE, f"{BASELINE}-cuda", "teacher-eager-bf16-cuda"} <= set(every)
    assert len(every) == len(set(every))
    few = names(device="cuda", variants="onnxruntime-fp32-cuda")
    assert few == [BASELINE, "teacher-onnxruntime-fp32-cuda", f"{BASELINE}-cuda"]
    assert names(device="cuda", variants="openvino-fp32") == [BASELINE, "teacher-openvino-fp32"]


def test_without_their_baseline_the_variants_of_a_gpu_have_a_reason(tmp_path: Path) -> None:
    def built(variant: str, reason: str = "") -> BuildResult:
        parts = variant.split("-", 2)
        return BuildResult(variant, *parts, None if reason else tmp_path, reason)

    done = [built(BASELINE), built("teacher-eager-bf16-cuda"), built(f"{BASELINE}-cuda")]
    assert optimize._with_baseline(done, BASELINE) == done
    done[2] = built(f"{BASELINE}-cuda", "no memory")
    cpu, half, gpu = optimize._with_baseline(done, BASELINE)
    assert (cpu, gpu) == (done[0], done[2])
    assert half.folder is None
    assert half.reason == (
        "teacher-eager-fp32-cuda is needed for every comparison on a GPU: no memory"
    )
