"""Timing and benchmarks in real worker processes with tiny ONNX Runtime variants."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from tiny.votes import LABELS, PREDICTIONS, ROWS, built_for_gpu, export, start_worker

from mlflow_pt_deploy.data.splits import Split, Splits
from mlflow_pt_deploy.errors import VariantError
from mlflow_pt_deploy.evaluation import Bench, Result, Worker, measure
from mlflow_pt_deploy.evaluation.timing import (
    gpu_throughput,
    interleave,
    sample_rows,
    throughput,
    warm_up,
)
from mlflow_pt_deploy.runtimes.onnxruntime import FILE


def test_rounds_time_both_sides_on_the_same_rows(folder: Path, worker: Worker) -> None:
    with start_worker(folder) as other:
        warm_up(worker, [0, 1, 2, 3])
        rounds = interleave(other, worker, [0, 1, 2, 3], seconds=0.3)
    assert len(rounds.ratios) >= 7
    assert len(rounds.samples_ms) % (4 * len(rounds.ratios)) == 0
    assert 0.3 < float(np.median(rounds.ratios)) < 3  # the same variant on both sides


def test_throughput_is_measured_at_each_batch_size(worker: Worker) -> None:
    rates = throughput(worker, [0, 1, 2, 3] * 40, row_s=0.3e-3, seconds=0.1)
    assert sorted(rates) == [8, 32, 128]
    assert all(rate > 100 for found in rates.values() for rate in found)
    # One pass of 128 rows would take longer than the budget.
    assert sorted(throughput(worker, [0, 1, 2, 3] * 40, row_s=1e-3, seconds=0.1)) == [8, 32]


class SmallDevice:
    """A worker whose device has memory for some rows only; a row takes a microsecond."""

    def __init__(self, rows: int, *, alive: bool = True) -> None:
        self.rows, self.alive = rows, alive

    def batch(self, indices: list[int], size: int) -> int:
        if min(size, len(indices)) > self.rows:
            raise VariantError("out of memory")
        return 1000 * len(indices)


def test_batches_that_a_gpu_has_no_memory_for_are_left_out() -> None:
    def sizes(rows: int, **options: bool) -> list[int]:
        worker = cast("Worker", SmallDevice(rows, **options))
        return sorted(gpu_throughput(worker, [0, 1, 2, 3], seconds=0.01))

    assert sizes(2000) == [8, 32, 128, 512, 1024]  # although there are four rows
    assert sizes(100) == [8, 32]
    with pytest.raises(VariantError, match="out of memory"):
        sizes(7)
    with pytest.raises(VariantError, match="out of memory"):  # its process has died
        sizes(100, alive=False)


def test_sampled_rows_are_distinct_and_reproducible() -> None:
    assert sorted(sample_rows(10, among=4)) == [0, 1, 2, 3]
    assert sample_rows(5, among=100) == sample_rows(5, among=100)
    assert len(set(sample_rows(5, among=100))) == 5


@pytest.fixture(scope="module")
def splits() -> Splits:
    validation = Split(ROWS * 5, np.array(PREDICTIONS * 5))  # the teacher is always correct
    test = Split(ROWS, np.array([0, 1, 1, 1]))  # the teacher is correct on two rows
    return Splits("colours", "here", LABELS, validation, validation, test)


@pytest.fixture(scope="module")
def results(folder: Path, splits: Splits) -> list[Result]:
    student = export(folder.parent / "student-onnxruntime-fp32", always_green=True)
    broken = folder.parent / "student-onnxruntime-broken"
    shutil.copytree(student, broken)
    (broken / FILE).write_bytes(b"not a graph")
    folders = {path.name: path for path in (student, broken, folder)}
    return measure(folders, baseline=folder.name, splits=splits, seconds=0.4, threads=1)


def test_a_broken_variant_does_not_affect_the_others(results: list[Result]) -> None:
    student, broken, teacher = results
    assert [each.reason for each in (student, teacher)] == ["", ""]
    assert "model.onnx is not the file that was exported" in broken.reason
    assert (broken.model, broken.runtime, broken.measurements) == ("student", "onnxruntime", ())


def test_quality_is_compared_with_targets_and_baseline(
    results: list[Result],
) -> None:
    student, _, teacher = results
    assert teacher.value("accuracy", "validation") == 1
    assert teacher.value("accuracy", "test") == 0.5
    assert student.value("accuracy", "validation") == 0.25  # one of ROWS is green
    assert student.value("accuracy", "test") == 0.75
    assert student.value("agreement", "test") == 0.25
    assert student.value("accuracy_drop", "test") == -0.25
    assert student.get("accuracy", "test").samples == (0, 1, 1, 1)


def test_the_answers_to_the_validation_rows_are_counted(results: list[Result]) -> None:
    student, broken, teacher = results
    assert student.profile is not None and teacher.profile is not None and broken.profile is None
    assert student.profile.labels == [0, 5 * len(ROWS), 0]
    assert teacher.profile.labels == np.bincount(PREDICTIONS * 5, minlength=3).tolist()
    for profile in (student.profile, teacher.profile):
        assert profile.rows == sum(profile.scores) == sum(profile.lengths) == 5 * len(ROWS)
    assert teacher.profile.lengths == student.profile.lengths and teacher.profile.pieces > 0
    again = Result.from_json(json.loads(json.dumps(student.to_json())))
    assert again.profile == student.profile
    older = {key: value for key, value in student.to_json().items() if key != "profile"}
    assert Result.from_json(older).profile is None


def test_the_speedup_of_the_baseline_is_about_one(results: list[Result]) -> None:
    speedup = results[2].get("speedup")
    assert 0.3 < speedup.value < 3
    assert speedup.low <= speedup.value <= speedup.high


def test_all_metrics_are_measured(results: list[Result]) -> None:
    assert sorted(results[0].metrics()) == [
        "agreement_perturbed",
        "agreement_perturbed_high",
        "agreement_perturbed_low",
        "artifact_mb",
        "batch_invariance",
        "best_batch_rows",
        "latency_mean_ms",
        "latency_p50_ms",
        "latency_p95_ms",
        "latency_p99_ms",
        "load_s",
        "peak_rss_mb",
        "speedup",
        "speedup_high",
        "speedup_low",
        "throughput_rows_per_s",
    ]
    assert sorted(results[0].metrics("test")) == [
        "accuracy",
        "accuracy_drop",
        "accuracy_drop_high",
        "accuracy_drop_low",
        "accuracy_kept",
        "accuracy_kept_low",
        "agreement",
        "calibration_error",
        "class_recall",
        "confidence",
        "macro_f1",
        "mcnemar_p",
    ]
    student, _, teacher = results
    assert teacher.value("agreement_perturbed") == 1
    assert student.value("agreement_perturbed") < 1  # it says green to everything
    kinds = ("typos", "case", "dropped", "swapped", "negated", "joined")
    assert all(student.value("agreement_perturbed", kind) is not None for kind in kinds)
    assert [each.value("batch_invariance") for each in (student, teacher)] == [1, 1]
    assert student.value("accuracy_kept", "validation") == 0.25
    assert student.predicted["test"] == (1,) * 4


def test_results_round_trip_through_json(results: list[Result]) -> None:
    assert [Result.from_json(json.loads(json.dumps(r.to_json()))) for r in results] == results


def test_the_baseline_must_be_among_the_variants(folder: Path, splits: Splits) -> None:
    with pytest.raises(VariantError, match="baseline teacher-eager-fp32 is not among"):
        measure({folder.name: folder}, baseline="teacher-eager-fp32", splits=splits)


def test_a_missing_baseline_is_an_error(tmp_path: Path, splits: Splits) -> None:
    gone = tmp_path / "teacher-eager-fp32"
    with pytest.raises(VariantError, match="is not a variant"):
        measure({gone.name: gone}, baseline=gone.name, splits=splits)


def test_a_killed_baseline_is_restarted(folder: Path, splits: Splits) -> None:
    with Bench(folder, splits, seconds=0.2, threads=1) as bench:
        first = bench.worker.pid
        os.kill(first, signal.SIGKILL)
        (result,) = bench.measure({folder.name: folder})
        assert bench.worker.pid != first
    assert not result.reason
    assert result.value("speedup")


@pytest.fixture(scope="module")
def on_both(folder: Path, splits: Splits) -> list[Result]:
    """Variants of both devices; the CPU stands in for the GPU, which no file of them needs."""
    gpu_baseline = built_for_gpu(export(folder.parent / f"{folder.name}-cuda"))
    green = export(folder.parent / "student-onnxruntime-fp32-cuda", always_green=True)
    folders = {each.name: each for each in (folder, gpu_baseline, built_for_gpu(green))}
    with Bench(
        folder,
        splits,
        seconds=0.2,
        threads=1,
        device_baselines={"cuda": gpu_baseline},
        gpu="cpu",
    ) as bench:
        assert len(bench.pids) == 1  # the second baseline is not needed yet
        found = bench.measure(folders)
        assert len(bench.pids) == 2
        found.append(bench.failed("student-eager-bf16-cuda", "no memory"))
    return found


def test_each_device_has_its_own_baseline(on_both: list[Result], folder: Path) -> None:
    cpu, gpu, green, failed = on_both
    assert [each.reason for each in on_both] == ["", "", "", "no memory"]
    assert [each.device for each in on_both] == ["cpu", "cuda", "cuda", "cuda"]
    assert (failed.runtime, failed.precision) == ("eager", "bf16")
    assert {each.baseline for each in on_both} == {folder.name}
    assert [each.timed_against for each in (cpu, green)] == [folder.name, gpu.variant]
    assert 0.02 < gpu.value("speedup") < 50  # itself
    over_cpu = gpu.get("speedup_over_cpu")
    assert over_cpu.low <= over_cpu.value <= over_cpu.high
    assert 0.02 < green.value("speedup_over_cpu") < 50  # the CPU stands in


def test_labels_are_compared_with_those_of_the_cpu(on_both: list[Result]) -> None:
    _, gpu, green, _ = on_both
    assert gpu.value("agreement", "test") == 1
    assert green.value("agreement", "test") == 0.25


def test_what_only_a_gpu_has_is_absent_on_the_cpu(on_both: list[Result]) -> None:
    cpu, gpu, *_ = on_both
    assert gpu.value("best_batch_rows") in (8, 32, 128, 512, 1024)
    assert gpu.value("best_batch_tokens") > 0
    assert not {"device_ms", "peak_device_mb"} & {each.name for each in gpu.measurements}
    assert not {"speedup_over_cpu", "best_batch_tokens"} & {e.name for e in cpu.measurements}
    assert gpu.gpu == ""
    again = Result.from_json(json.loads(json.dumps(gpu.to_json())))
    assert again == gpu
