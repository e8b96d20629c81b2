"""Choices among variants of the CPU and of a GPU; a speedup is over the baseline of its device."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mlflow_pt_deploy.errors import PolicyError
from mlflow_pt_deploy.evaluation import Measurement, Result
from mlflow_pt_deploy.selection.cascade_planner import plan_cascades
from mlflow_pt_deploy.selection.challenge import Measured, challenge
from mlflow_pt_deploy.selection.choice import choose, finalists
from mlflow_pt_deploy.selection.policy import Policy

BASELINE = "teacher-eager-fp32"


def result(variant: str, speedup: float, rate: float, *, over_cpu: float = 0.0) -> Result:
    """A result of ten rows, all correct; with `over_cpu` it runs on a GPU."""
    found = [
        Measurement("latency_mean_ms", 10 / (over_cpu or speedup), "ms"),
        Measurement("latency_p50_ms", 10 / (over_cpu or speedup), "ms"),
        Measurement("throughput_rows_per_s", rate, "rows/s"),
        Measurement("speedup", speedup, "x", low=0.9 * speedup, high=1.1 * speedup),
        Measurement("artifact_mb", 50, "MB"),
        Measurement("accuracy", 1.0, "fraction", "validation", samples=(1.0,) * 10),
        Measurement("accuracy_drop", 0.0, "fraction", "validation"),
        Measurement("accuracy_kept", 1.0, "fraction", "validation", low=0.99),
        Measurement("confidence", 0.9, "fraction", "validation", samples=(0.9,) * 10),
    ]
    if over_cpu:
        low, high = 0.8 * over_cpu, 1.2 * over_cpu
        found.append(Measurement("speedup_over_cpu", over_cpu, "x", low=low, high=high))
        found.append(Measurement("peak_device_mb", 900, "MB"))
    model, runtime, precision = variant.removesuffix("-cuda").split("-", 2)
    device = "cuda" if over_cpu else "cpu"
    return Result(variant, model, runtime, precision, device, 4, None, "", tuple(found), BASELINE)


CPU = result(BASELINE, 1, 100)
FUSED = result("teacher-openvino-fp32", 6, 400)
GPU = result(f"{BASELINE}-cuda", 1, 3000, over_cpu=5)
HALF = result("teacher-eager-bf16-cuda", 2, 9000, over_cpu=10)
ALL = [CPU, FUSED, GPU, HALF]


def test_latencies_are_compared_over_the_baseline_of_the_cpu() -> None:
    choice = choose(ALL, Policy())
    assert choice.variant == HALF.variant
    assert choice.runner_up == FUSED.variant  # 6x; eager on the GPU is 5x
    assert choice.reason.startswith(
        "teacher-eager-bf16-cuda takes 1 ms per row (median) on the GPU, the best among the "
        "variants within the limits. For single rows it is 10x as fast as teacher-eager-fp32 on "
        "the CPU (95 % interval 8 to 12), and 2x as fast as teacher-eager-fp32-cuda on the same "
        "device."
    )


def test_ties_on_one_device_are_by_its_own_baseline() -> None:
    near = result("teacher-onnxruntime-fp32-cuda", 1.85, 5000, over_cpu=9.25)
    far = result("teacher-onnxruntime-fp32-cuda", 1.7, 5000, over_cpu=8.5)
    tied = "kept: tied with the best, but not preferred"
    assert dict(choose([*ALL, near], Policy()).considered)[near.variant] == tied
    # within the wide interval over the CPU, but not within that of their own device
    assert dict(choose([*ALL, far], Policy()).considered)[far.variant] != tied
    close = result("teacher-openvino-bf16", 8.5, 500)
    assert dict(choose([*ALL, close], Policy()).considered)[close.variant] == tied


def test_allowed_devices() -> None:
    choice = choose(ALL, Policy(devices=("cpu",)))
    assert choice.variant == FUSED.variant
    assert "on the" not in choice.reason  # one device only: as without a GPU
    why = dict(choice.considered)[HALF.variant]
    assert why == "excluded: device cuda is not allowed (devices=cpu)"
    assert finalists(ALL, Policy(devices=("cuda",))) == [HALF.variant, GPU.variant]


def test_device_memory_limits_variants_on_a_gpu_only() -> None:
    choice = choose(ALL, Policy(max_peak_device_mb=500))
    assert choice.variant == FUSED.variant
    why = dict(choice.considered)[HALF.variant]
    assert why == "excluded: peak device memory 900 MB is over 500 MB (max_peak_device_mb)"
    unknown = replace(HALF, measurements=HALF.measurements[:-1])
    why = dict(choose([CPU, unknown], Policy(max_peak_device_mb=1000)).considered)
    assert why[HALF.variant] == "not measured: peak_device_mb"
    assert choose(ALL, Policy(max_peak_device_mb=1000)).variant == HALF.variant


@pytest.mark.parametrize(("gpu_hour", "chosen"), [(1.0, HALF), (20.0, FUSED)])
def test_the_cost_of_a_row_includes_the_gpu(gpu_hour: float, chosen: Result) -> None:
    policy = Policy(objective="cost", price_per_core_hour=0.1, price_per_gpu_hour=gpu_hour)
    assert choose(ALL, policy).variant == chosen.variant


def test_a_gpu_without_a_price() -> None:
    policy = Policy(objective="cost", price_per_core_hour=0.1)
    with pytest.raises(PolicyError, match=r"needs price_per_gpu_hour.*or allow devices=cpu only"):
        choose(ALL, policy)
    assert choose([CPU, FUSED], policy).variant == FUSED.variant
    failed = replace(HALF, reason="no memory", measurements=())
    assert choose([CPU, FUSED, failed], policy).variant == FUSED.variant


def test_cascades_are_planned_of_variants_on_the_cpu() -> None:
    assert plan_cascades([GPU, HALF], Policy()) == []


HERE = {"validation": "1a2b3c4d", "hardware": "a cpu, 2 cores"}
GPU_HERE = {**HERE, "gpu": "NVIDIA H100"}


def test_a_challenger_on_the_gpu_of_the_same_machine() -> None:
    verdict = challenge(Measured(HALF, "new", GPU_HERE), Measured(FUSED, "old", HERE), Policy())
    assert verdict.replaces
    assert "1 against 1.667 ms per row" in verdict.reason
    within = challenge(Measured(HALF, "run", GPU_HERE), Measured(FUSED, "run", GPU_HERE), Policy())
    assert within.reason.startswith("its latency is better: 10x against 6x")


def test_results_of_two_gpus_are_not_compared() -> None:
    other = {**HERE, "gpu": "NVIDIA T4"}
    with pytest.raises(PolicyError, match="other hardware .NVIDIA T4 instead of NVIDIA H100"):
        challenge(Measured(HALF, "new", GPU_HERE), Measured(GPU, "old", other), Policy())
