"""Cascade planner, with plans worked out by hand."""

from __future__ import annotations

import pytest

from mlflow_pt_deploy.evaluation import Measurement, Result
from mlflow_pt_deploy.selection.cascade_planner import plan_cascades


def result(
    variant: str, right: str, confidences: tuple[float, ...], speedup: float, reason: str = ""
) -> Result:
    """A result; `right` has a 1 for each of ten validation rows with the correct label, else 0."""
    scores = tuple(map(float, right))
    accuracy = sum(scores) / len(scores)
    model, runtime, precision = variant.split("-", 2)
    measurements = (
        Measurement("speedup", speedup, "x"),
        Measurement("accuracy", accuracy, "fraction", "validation", samples=scores),
        Measurement("accuracy_drop", 0.9 - accuracy, "fraction", "validation"),
        Measurement("confidence", 0.5, "fraction", "validation", samples=confidences),
    )
    return Result(
        variant, model, runtime, precision, "cpu", 2, None, reason, measurements=measurements
    )


CONFIDENT = (0.99,) * 10
TEACHER = result("teacher-eager-fp32", "1111111110", CONFIDENT, 1)
STUDENT = result("student-openvino-fp32", "1111111110", CONFIDENT, 10)
# Wrong on rows 0, 2 and 9. Rows by ascending confidence: 0, 5, 2, ..., 9.
STATIC = result(
    "static-numpy-fp32",
    "0101111110",
    (0.1, 0.9, 0.4, 0.9, 0.9, 0.2, 0.9, 0.9, 0.9, 0.95),
    100,
)


def test_threshold_is_above_the_last_required_row() -> None:
    plans = plan_cascades([TEACHER, STUDENT, STATIC], retain=0.97)
    # Required: 0.873 + 0.002. With rows 0, 5 and 2 deferred, nine of ten are correct.
    assert [(plan.fast, plan.strong) for plan in plans] == [
        ("static-numpy-fp32", "student-openvino-fp32")
    ]
    assert plans[0].threshold == pytest.approx((0.4 + 0.9) / 2)
    assert plans[0].deferral == pytest.approx(0.3)
    assert plans[0].accuracy == pytest.approx(0.9)
    assert plans[0].cost == pytest.approx(1 / 100 + 0.3 / 10)


def test_no_more_rows_are_deferred_than_required() -> None:
    (plan,) = plan_cascades([TEACHER, STUDENT, STATIC], retain=0.88)  # requires 0.792: eight of ten
    assert plan.threshold == pytest.approx((0.1 + 0.2) / 2)
    assert plan.deferral == pytest.approx(0.1)


def test_no_cascade_if_the_fast_model_is_accurate_enough() -> None:
    assert plan_cascades([TEACHER, STUDENT, STATIC], retain=0.7) == []


def test_unreachable_accuracy() -> None:
    assert plan_cascades([TEACHER, STUDENT, STATIC], retain=1.0) == []  # because of the margin


def test_no_cascade_that_is_slower_than_its_strong_model() -> None:
    slow = result("static-numpy-fp32", "0101111110", (*[0.9] * 9, 0.95), 11)
    assert plan_cascades([TEACHER, STUDENT, slow], retain=0.97) == []


def test_failed_variants_are_ignored() -> None:
    failed = result("student-openvino-fp32", "1111111110", CONFIDENT, 10, reason="no memory")
    (plan,) = plan_cascades([TEACHER, failed, STATIC], retain=0.97)
    assert plan.strong == "teacher-eager-fp32"
    assert plan_cascades([], retain=0.9) == []
