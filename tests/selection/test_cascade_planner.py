"""Cascade planner: thresholds, and their judgement on the other half of the rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mlflow_pt_deploy.evaluation import Measurement, Result
from mlflow_pt_deploy.selection.cascade_planner import (
    CascadePlan,
    _threshold,
    cross_fitted,
    plan_cascades,
)
from mlflow_pt_deploy.selection.policy import Policy

ROWS = 400
BASELINE = "teacher-eager-fp32"
LOOSE = Policy(retain=0.97, retain_low=0.9)


def result(
    variant: str, correct: np.ndarray, confidence: np.ndarray, speedup: float, reason: str = ""
) -> Result:
    accuracy = float(correct.mean())
    model, runtime, precision = variant.split("-", 2)
    measurements = (
        Measurement("speedup", speedup, "x"),
        Measurement(
            "accuracy", accuracy, "fraction", "validation", samples=tuple(map(float, correct))
        ),
        Measurement("accuracy_drop", 0.9 - accuracy, "fraction", "validation", 0.0, 0.0),
        Measurement("accuracy_kept", accuracy / 0.9, "fraction", "validation", low=0.9),
        Measurement("mcnemar_p", 0.5, "probability", "validation"),
        Measurement("confidence", 0.5, "fraction", "validation", samples=tuple(confidence)),
        Measurement("accuracy", 0.7, "fraction", "test"),
    )
    return Result(
        variant, model, runtime, precision, "cpu", 2, None, reason, measurements, BASELINE
    )


def results(speedup: float = 100.0, informative: bool = True) -> list[Result]:
    """A teacher and a student that are right in 90 %, and a static one that is so in 75 %.

    The static one is unsure exactly where it is wrong, or its confidence says nothing.
    """
    random = np.random.default_rng(1)
    teacher = np.arange(ROWS) % 10 > 0
    static = teacher & (random.random(ROWS) > 1 / 6)
    confidence = random.random(ROWS)
    if informative:
        confidence = np.where(static, 0.5 + confidence / 2, confidence / 2)
    sure = np.full(ROWS, 0.99)
    return [
        result(BASELINE, teacher, sure, 1),
        result("student-openvino-fp32", teacher, sure, 10),
        result("static-numpy-fp32", static, confidence, speedup),
    ]


def test_the_unsure_rows_go_to_the_strong_model() -> None:
    (plan,) = plan_cascades(results(), LOOSE)
    assert (plan.fast, plan.strong) == ("static-numpy-fp32", "student-openvino-fp32")
    assert 0.1 < plan.deferral < 0.35
    assert plan.threshold < 0.51
    assert plan.cost == pytest.approx(1 / 100 + plan.deferral / 10)
    assert plan.accuracy >= 0.97 * 0.9
    assert len(plan.correct) == ROWS


def test_the_accuracy_is_that_of_the_other_half() -> None:
    """With a confidence that says nothing, the deferred rows are others in each half."""
    plans = plan_cascades(results(informative=False), LOOSE)
    for plan in plans:
        fast = np.array(results(informative=False)[2].get("confidence", "validation").samples)
        own = (fast < plan.threshold).mean()  # the higher threshold of both halves
        assert plan.deferral == pytest.approx(own)


def test_the_threshold_is_above_the_last_required_row() -> None:
    confidence = np.array([0.1, 0.9, 0.4, 0.9, 0.9, 0.2, 0.9, 0.9, 0.9, 0.95])
    fast = np.array([0, 1, 0, 1, 1, 1, 1, 1, 1, 0], dtype=float)
    strong = np.array([1, 1, 1, 1, 1, 1, 1, 1, 1, 0], dtype=float)
    assert _threshold(confidence, fast, strong, 0.8) == pytest.approx((0.1 + 0.2) / 2)
    assert _threshold(confidence, fast, strong, 0.875) == pytest.approx((0.4 + 0.9) / 2)
    assert _threshold(confidence, fast, strong, 0.7) == 0
    assert _threshold(confidence, fast, strong, 0.95) is None


def test_no_cascade_if_none_is_needed_or_possible() -> None:
    assert plan_cascades(results(), Policy(retain=0.5)) == []  # the fast one is good enough
    assert plan_cascades(results(), Policy(retain=1.0)) == []  # because of the margin
    assert plan_cascades(results(speedup=11), LOOSE) == []  # slower than the strong one
    assert plan_cascades([], LOOSE) == []
    assert plan_cascades(results()[1:], LOOSE) == []  # without the baseline


def test_retain_low_is_required_of_the_cross_fitted_accuracy() -> None:
    assert plan_cascades(results(), Policy(retain=0.97, retain_low=0.969)) == []


def test_failed_variants_are_ignored() -> None:
    teacher, student, static = results()
    (plan,) = plan_cascades([teacher, replace(student, reason="no memory"), static], LOOSE)
    assert plan.strong == BASELINE


def test_a_measured_cascade_gets_the_cross_fitted_accuracy() -> None:
    teacher, student, _ = results()
    correct = tuple(float(at % 10 > 1) for at in range(ROWS))  # 80 %
    plan = CascadePlan("static-numpy-fp32", student.variant, 0.5, 0.2, correct, 0.05)
    judged = cross_fitted(student, plan, teacher)
    assert judged.value("accuracy", "validation") == pytest.approx(0.8)
    assert judged.get("accuracy", "validation").samples == correct
    assert judged.value("accuracy_drop", "validation") == pytest.approx(0.1)
    assert judged.get("accuracy_drop", "validation").low > 0.05
    assert judged.value("accuracy_kept", "validation") == pytest.approx(8 / 9)
    assert judged.value("mcnemar_p", "validation") < 1e-6
    assert judged.value("accuracy", "test") == 0.7
    failed = replace(student, reason="no memory")
    assert cross_fitted(failed, plan, teacher) is failed
