"""Whether a model is better than a constant answer, and timings that contradict each other."""

from __future__ import annotations

import numpy as np
import pytest

from mlflow_pt_deploy.measure import Measurement, Result
from mlflow_pt_deploy.measure.chance import chance_note
from mlflow_pt_deploy.remarks import remarks

LABELS = ("card", "refund")
BASELINE = "teacher-eager-fp32"


def rows(*counts: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Targets and answers: (target, answer, how many)."""
    targets = np.concatenate([np.full(count, target) for target, _, count in counts])
    return targets, np.concatenate([np.full(count, answer) for _, answer, count in counts])


@pytest.mark.parametrize(
    ("counts", "note"),
    [
        ([(0, 0, 45), (1, 1, 40), (1, 0, 5)], ""),
        ([(0, 0, 1), (1, 1, 99)], ""),  # right on all, one of them rare
        (
            [(0, 0, 60), (1, 0, 40)],
            "answers every validation row with 'card': it is right on 60.0%; always answering "
            "'card' is right on 60.0%",
        ),
        (
            [(0, 1, 60), (1, 1, 40)],
            "answers every validation row with 'refund': it is right on 40.0%; always answering "
            "'card' is right on 60.0%",
        ),
        (
            [(0, 0, 30), (0, 1, 30), (1, 1, 25), (1, 0, 15)],
            "is at chance level: it is right on 55.0% of 100 validation rows; always answering "
            "'card' is right on 60.0%",
        ),
        # Above, but not beyond noise; of ten times the rows it is.
        (
            [(0, 0, 58), (0, 1, 2), (1, 1, 5), (1, 0, 35)],
            "is no better than chance beyond noise: it is right on 63.0% of 100 validation rows; "
            "always answering 'card' is right on 60.0%",
        ),
        ([(0, 0, 580), (0, 1, 20), (1, 1, 50), (1, 0, 350)], ""),
        ([(0, 0, 4), (1, 1, 4)], ""),
    ],
)
def test_a_model_at_chance_level_is_called_that(
    counts: list[tuple[int, int, int]], note: str
) -> None:
    targets, predicted = rows(*counts)
    assert chance_note(targets, predicted, LABELS) == note


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
    ("p50", "speedup", "said"),
    [
        (5, (2, 1.9, 2.1), ""),
        (4, (2, 1.9, 2.1), ""),  # 2.5x is not far from 2x
        (10 / 1.3, (2.1, 2, 2.2), "student-onnx-fp32 1.3x, interleaved 2.1x"),
        (2, (2.1, 2, 2.2), "student-onnx-fp32 5x, interleaved 2.1x"),
        (10 / 1.3, (2.1, 1.2, 3), ""),  # its interval holds 1.3
        (11.2, (1.15, 1.12, 1.2), "student-onnx-fp32 0.893x, interleaved 1.15x"),  # opposite signs
        (10.2, (1.05, 1.04, 1.06), ""),
        (0, (2, 1.9, 2.1), ""),
        (5, None, ""),
    ],
)
def test_timings_that_contradict_each_other(
    p50: float, speedup: tuple[float, float, float] | None, said: str
) -> None:
    found = remarks([TEACHER, result("student-onnx-fp32", p50, speedup)])
    if not said:
        assert found == []
        return
    assert found == [
        f"The machine was uneven while timing: by p50, which is taken at different times, {said}. "
        "Trust the interleaved one (speedup)."
    ]


def test_a_cascades_median_says_nothing() -> None:
    assert remarks([TEACHER, result("cascade-cascade-mixed", 1, (2, 1.9, 2.1))]) == []


def test_without_the_baselines_row_nothing_is_compared() -> None:
    assert remarks([result("student-onnx-fp32", 1, (2, 1.9, 2.1))]) == []


def test_many_contradictions_and_many_notes_stay_short() -> None:
    odd = [result(f"student-{name}-fp32", 1, (2, 1.9, 2.1), ("is bad",)) for name in "abcde"]
    first, second = remarks([TEACHER, *odd])
    assert first == "student-a-fp32 (and 4 more of student) is bad."
    assert "student-c-fp32 10x, interleaved 2x and 2 more. Trust" in second
