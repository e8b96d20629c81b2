"""Device time, device memory and the state of a GPU, of a real worker on one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mlflow_pt_deploy.artifacts import write_variant
from mlflow_pt_deploy.data import Splits
from mlflow_pt_deploy.evaluation import Bench, Result, Worker
from mlflow_pt_deploy.evaluation.baseline import start_baseline
from mlflow_pt_deploy.evaluation.gpu_state import GpuState
from mlflow_pt_deploy.evaluation.on_gpu import GpuWatch, gpu_measurements
from mlflow_pt_deploy.evaluation.timing import GPU_BATCH_ROWS, gpu_throughput
from mlflow_pt_deploy.runtimes.base import Variant
from mlflow_pt_deploy.runtimes.eager import Eager


@pytest.fixture(scope="module")
def folder_of(
    tiny_model: Path,
    tiny_splits: Splits,
    once: Callable[[str, Callable[[Path], object]], Path],
) -> Callable[[Variant], Path]:
    """Exports a variant of the tiny model, once."""
    from mlflow_pt_deploy.models import load_classifier

    def export(variant: Variant) -> Path:
        rows = tiny_splits.validation.rows
        classifier = load_classifier(str(tiny_model))
        example = classifier.preprocessor(rows[:3])
        name = f"measured-{variant.name('teacher')}"
        return once(
            name,
            lambda folder: write_variant(
                variant, classifier, folder, model="teacher", example=example, golden_rows=rows[:2]
            ),
        )

    return export


@pytest.fixture(scope="module")
def gpu_worker(tiny_splits: Splits, folder_of: Callable[[Variant], Path]) -> Iterator[Worker]:
    """Eager fp32, built for a GPU."""
    rows = tiny_splits.validation.rows
    with Worker(folder_of(Eager("fp32", device="cuda")), rows[0], threads=1) as worker:
        worker.load_rows(rows)
        yield worker


BLANK = Result("teacher-eager-fp32-cuda", "teacher", "eager", "fp32", "cuda", 1, None)


def test_nothing_is_made_up_where_there_is_no_gpu(worker: Worker) -> None:
    assert worker.gpu() == ""
    found = gpu_measurements(worker, [0, 1], [0, 1, 2, 3], 16, worker.gpu())
    assert [(each.name, each.value) for each in found] == [("best_batch_tokens", 16 * 5)]
    watch = GpuWatch(worker.gpu())
    assert watch.before == GpuState()
    assert watch.finish(BLANK, worker, [0, 1], {worker.pid}) == BLANK


def test_throughput_reaches_large_batches(worker: Worker) -> None:
    rates = gpu_throughput(worker, [0, 1, 2, 3], seconds=0.1)
    assert tuple(rates) == GPU_BATCH_ROWS
    assert all(rate > 1 for found in rates.values() for rate in found)


def test_the_reference_is_compared_with_nothing(worker: Worker) -> None:
    baseline = start_baseline(worker, 4, 0.1, None)
    assert (baseline.gpu, baseline.over_reference) == ("", None)


@pytest.mark.gpu
def test_what_is_measured_on_a_gpu(gpu_worker: Worker) -> None:
    assert gpu_worker.gpu().startswith(("GPU-", "MIG-"))
    rows = list(range(8))
    measured = gpu_measurements(gpu_worker, rows, rows, 16, gpu_worker.gpu())
    found = {each.name: each.value for each in measured}
    assert found["best_batch_tokens"] >= 16
    assert 1 < found["peak_device_mb"] < 4000
    gpu_worker.time(rows)
    host_ms = sorted(gpu_worker.time(rows, 4))[len(rows) * 2] / 1e6
    assert 0 < found["device_ms"] < 2 * host_ms
    assert tuple(gpu_throughput(gpu_worker, rows, seconds=0.1)) == GPU_BATCH_ROWS


@pytest.mark.gpu
def test_the_state_of_the_gpu_is_noted(gpu_worker: Worker) -> None:
    watch = GpuWatch(gpu_worker.gpu())
    done = watch.finish(BLANK, gpu_worker, [0, 1], {gpu_worker.pid})
    if watch.before == GpuState():
        pytest.skip("nvidia-smi says nothing here")
    assert watch.before.name
    assert done.gpu.startswith("before: ") and "under load: " in done.gpu


@pytest.mark.gpu
def test_variants_of_both_devices_in_one_table(
    tiny_splits: Splits, folder_of: Callable[[Variant], Path]
) -> None:
    pytest.importorskip("scipy")
    variants = (Eager(), Eager(device="cuda"), Eager("bf16", device="cuda"))
    folders = {each.name("teacher"): folder_of(each) for each in variants}
    baseline, on_gpu, _ = folders.values()
    with Bench(
        baseline, tiny_splits, seconds=0.5, threads=1, device_baselines={"cuda": on_gpu}
    ) as bench:
        cpu, gpu, half = bench.measure(folders)
    assert [each.reason for each in (cpu, gpu, half)] == ["", "", ""]
    assert [each.device for each in (cpu, gpu, half)] == ["cpu", "cuda", "cuda"]
    for each in (gpu, half):
        assert each.value("agreement", "validation") > 0.95
        assert 0 < each.value("device_ms") <= 2 * each.value("latency_p50_ms")
        assert each.value("peak_device_mb") > 1
        assert each.value("speedup_over_cpu") > 0
    assert 0.5 < gpu.value("speedup") < 2  # itself
    assert cpu.value("device_ms") is None and cpu.value("peak_device_mb") is None
