"""The pair of a portable variant: the best on each device, of one model, within the limits."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mlflow_pt_deploy.evaluation import Measurement, Result
from mlflow_pt_deploy.selection.policy import Policy
from mlflow_pt_deploy.selection.portable_planner import plan_portable

BASELINE = "teacher-eager-fp32"


def result(variant: str, speedup: float, accuracy: float = 0.9) -> Result:
    model, runtime, precision = variant.split("-", 2)
    drop, kept = 0.9 - accuracy, accuracy / 0.9
    measurements = (
        Measurement("latency_p50_ms", 10 / speedup, "ms"),
        Measurement("latency_p95_ms", 20 / speedup, "ms"),
        Measurement("throughput_rows_per_s", 100 * speedup, "rows/s"),
        Measurement("speedup", speedup, "x", low=0.9 * speedup, high=1.1 * speedup),
        Measurement("artifact_mb", 90.0, "MB"),
        Measurement("accuracy", accuracy, "fraction", "validation"),
        Measurement("accuracy_drop", drop, "fraction", "validation"),
        Measurement("accuracy_kept", kept, "fraction", "validation", low=kept - 0.01),
    )
    device = "cuda" if variant.endswith("-cuda") else "cpu"
    return Result(variant, model, runtime, precision, device, 2, None, "", measurements, BASELINE)


TEACHER = result(BASELINE, 1)
FUSED = result("teacher-openvino-fp32", 3)
SMALL = result("student-openvino-int8-static", 10)
ON_GPU = [result("teacher-eager-bf16-cuda", 15), result("student-eager-bf16-cuda", 20)]


def test_the_best_of_each_device() -> None:
    plan = plan_portable([TEACHER, FUSED, SMALL, *ON_GPU], Policy())
    assert plan == ("student-openvino-int8-static", "student-eager-bf16-cuda")


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ([TEACHER, FUSED, SMALL], None),  # nothing was measured on a GPU
        ([TEACHER, FUSED, *ON_GPU], ("teacher-openvino-fp32", "teacher-eager-bf16-cuda")),
        ([TEACHER, replace(SMALL, reason="failed"), ON_GPU[1]], None),
        ([TEACHER, result("student-openvino-fp32", 9, accuracy=0.5), ON_GPU[1]], None),
        ([TEACHER, result("cascade-static-student", 50), ON_GPU[1]], None),
        (
            [TEACHER, SMALL, replace(ON_GPU[1], device="cuda:1")],
            ("student-openvino-int8-static", "student-eager-bf16-cuda"),
        ),
        (
            [TEACHER, result("teacher-portable-mixed-cuda", 99), FUSED, ON_GPU[0]],
            ("teacher-openvino-fp32", "teacher-eager-bf16-cuda"),
        ),
    ],
)
def test_other_results(results: list[Result], expected: tuple[str, str] | None) -> None:
    assert plan_portable(results, Policy()) == expected


def test_limits_hold_on_both_devices_and_runtimes_on_neither() -> None:
    results = [TEACHER, FUSED, SMALL, *ON_GPU]
    fast = Policy(max_latency_p95_ms=1.5)
    assert plan_portable(results, fast) is None
    both = ("student-openvino-int8-static", "student-eager-bf16-cuda")
    assert plan_portable(results, Policy(runtimes=("portable",))) == both
