"""Warnings below a table: notes of the results and inconsistent timings."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mlflow_pt_deploy.evaluation import Measurement, Result
from mlflow_pt_deploy.reporting.remarks import headline, remarks

BASELINE = "teacher-eager-fp32"


def result(
    variant: str,
    p50: float,
    speedup: tuple[float, float, float] | None = None,
    notes: tuple[str, ...] = (),
) -> Result:
    model, runtime, precision = variant.split("-", 2)
    found = [Measurement("latency_p50_ms", p50, "ms")]
    if speedup:
        value, low, high = speedup
        found.append(Measurement("speedup", value, "x", low=low, high=high))
    return Result(
        variant, model, runtime, precision, "cpu", 2, None, "", tuple(found), BASELINE, notes
    )


TEACHER = result(BASELINE, 10, (1, 0.98, 1.02))


@pytest.mark.parametrize(
    ("p50", "speedup", "expected"),
    [
        (5, (2, 1.9, 2.1), ""),
        (4, (2, 1.9, 2.1), ""),  # 2.5x is not far from 2x
        (10 / 1.3, (2.1, 2, 2.2), "student-onnx-fp32 1.3x, interleaved 2.1x"),
        (2, (2.1, 2, 2.2), "student-onnx-fp32 5x, interleaved 2.1x"),
        (10 / 1.3, (2.1, 1.2, 3), ""),  # the interval contains 1.3
        (11.2, (1.15, 1.12, 1.2), "student-onnx-fp32 0.893x, interleaved 1.15x"),  # opposite signs
        (10.2, (1.05, 1.04, 1.06), ""),
        (0, (2, 1.9, 2.1), ""),
        (5, None, ""),
    ],
)
def test_inconsistent_timings(
    p50: float, speedup: tuple[float, float, float] | None, expected: str
) -> None:
    found = remarks([TEACHER, result("student-onnx-fp32", p50, speedup)])
    if not expected:
        assert found == []
        return
    assert found == [
        "The speed of the machine varied during timing: by p50, measured at different times, "
        f"{expected}. Trust the interleaved value (speedup)."
    ]


def test_a_cascade_is_not_checked() -> None:
    assert remarks([TEACHER, result("cascade-cascade-mixed", 1, (2, 1.9, 2.1))]) == []


def test_without_a_baseline_result_nothing_is_compared() -> None:
    assert remarks([result("student-onnx-fp32", 1, (2, 1.9, 2.1))]) == []


def test_many_remarks_are_abbreviated() -> None:
    others = [result(f"student-{name}-fp32", 1, (2, 1.9, 2.1), ("is bad",)) for name in "abcde"]
    first, second = remarks([TEACHER, *others])
    assert first == "student-a-fp32 (and 4 more of student) is bad."
    assert "student-c-fp32 10x, interleaved 2x and 2 more. Trust" in second


def test_each_device_has_its_own_noise_and_its_own_baseline() -> None:
    gpu = replace(result(f"{BASELINE}-cuda", 2, (1.4, 1.38, 1.42)), device="cuda")
    half = replace(result("teacher-eager-bf16-cuda", 1, (2, 1.9, 2.1)), device="cuda")
    # by p50 it is 2x as fast as the baseline of its device, and 10x as that of the CPU
    assert not any("varied" in each for each in remarks([TEACHER, gpu, half]))
    warning = headline([TEACHER, gpu, half], None, None)
    assert warning.startswith("The timings on cuda are unreliable: the baseline, measured against")
    assert headline([TEACHER, half], None, None) == ""
