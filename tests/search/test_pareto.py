"""Pareto front and selection of a trial, with cases worked out by hand."""

from __future__ import annotations

import pytest

from mlflow_pt_deploy.errors import PolicyError, SearchError
from mlflow_pt_deploy.search import (
    CompletedTrial,
    FailedTrial,
    Outcome,
    StudyResult,
    TrialParams,
    choose_point,
    pareto,
)

POINT = TrialParams("transformer", 3, 2.0, 0.7, 2e-4, 32, 4, "onnxruntime-fp32", 1)


def finished(
    number: int,
    accuracy: float,
    latency_ms: float,
    point: TrialParams = POINT,
    curve: tuple[tuple[int, float], ...] = (),
) -> CompletedTrial:
    return CompletedTrial(number, point, Outcome(accuracy, latency_ms), curve)


@pytest.mark.parametrize(
    ("outcomes", "front"),
    [
        ([], []),
        ([(0.8, 1.0)], [0]),
        # slower and less accurate than the first
        ([(0.8, 1.0), (0.7, 2.0)], [0]),
        # three optimal outcomes; the fourth is as fast as the second, but less accurate
        ([(0.9, 3.0), (0.8, 2.0), (0.7, 1.0), (0.75, 2.0)], [2, 1, 0]),
        # equally accurate: the faster one
        ([(0.8, 2.0), (0.8, 1.0)], [1]),
        # equal in both: both are kept, in their order
        ([(0.9, 3.0), (0.8, 2.0), (0.7, 1.0), (0.8, 2.0)], [2, 1, 3, 0]),
    ],
)
def test_pareto_front(outcomes: list[tuple[float, float]], front: list[int]) -> None:
    assert pareto([Outcome(*outcome) for outcome in outcomes]) == front


FOUND = StudyResult(
    (finished(0, 0.70, 0.1), finished(1, 0.891, 1.5), finished(3, 0.90, 4.0), finished(4, 0.8, 5)),
    (FailedTrial(2, POINT, "failed", "out of memory"),),
)


def test_fastest_trial_with_the_required_accuracy_is_selected() -> None:
    chosen = choose_point(FOUND, 0.99, 0.9)  # requires 0.891
    assert (chosen.trial.number, chosen.meets) == (1, True)
    assert chosen.reason == (
        "Trial 1, a transformer student of 3 layers on onnxruntime-fp32 with 1 thread, has a "
        "latency of 1.5 ms and a validation accuracy of 0.8910: the fastest of 4 finished trials "
        "with an accuracy of at least 0.8910 (0.99 of the teacher's 0.9000)."
    )
    assert choose_point(FOUND, 0.5, 0.9).trial.number == 0
    assert choose_point(FOUND, 1.0, 0.9).trial.number == 3
    # 0.8 * 0.51 is 0.40800000000000003 in floating point, which must not reject 0.408
    assert choose_point(StudyResult((finished(0, 0.408, 1.0),), ()), 0.8, 0.51).meets


def test_most_accurate_trial_is_selected_if_none_is_accurate_enough() -> None:
    chosen = choose_point(FOUND, 0.99, 0.95)
    assert (chosen.trial.number, chosen.meets) == (3, False)
    assert "none of which reaches 0.9405 (0.99 of the teacher's 0.9500)" in chosen.reason


def test_no_finished_trial_is_an_error_with_the_first_failure() -> None:
    with pytest.raises(SearchError, match="1 failed, 0 pruned.*First failure: out of memory"):
        choose_point(StudyResult((), FOUND.dropped), 0.99, 0.9)
    with pytest.raises(PolicyError, match="retain is 99"):
        choose_point(FOUND, 99, 0.9)
