"""Pareto front and selection of a trial, with cases worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mlflow_pt_deploy.errors import SearchError
from mlflow_pt_deploy.search import (
    CompletedTrial,
    FailedTrial,
    Outcome,
    StudyResult,
    TrialParams,
    choose_point,
    pareto,
)
from mlflow_pt_deploy.selection.policy import Policy

POINT = TrialParams("transformer", 3, 2.0, 0.7, 2e-4, 32, 4, "onnxruntime-fp32", 1)


def keeping(retain: float, retain_low: float = 0.0) -> Policy:
    return Policy(retain=retain, retain_low=retain_low)


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
    chosen = choose_point(FOUND, keeping(0.99), 0.9)  # requires 0.891
    assert (chosen.trial.number, chosen.meets) == (1, True)
    assert chosen.reason == (
        "Trial 1, a transformer student of 3 layers on onnxruntime-fp32 with 1 thread, has a "
        "latency of 1.5 ms and a validation accuracy of 0.8910: the fastest of 4 finished trials "
        "with an accuracy of at least 0.8910 (0.99 of the teacher's 0.9000)."
    )
    assert choose_point(FOUND, keeping(0.5), 0.9).trial.number == 0
    assert choose_point(FOUND, keeping(1.0), 0.9).trial.number == 3
    # 0.8 * 0.51 is 0.40800000000000003 in floating point, which must not reject 0.408
    assert choose_point(StudyResult((finished(0, 0.408, 1.0),), ()), keeping(0.8), 0.51).meets


def test_most_accurate_trial_is_selected_if_none_is_accurate_enough() -> None:
    chosen = choose_point(FOUND, keeping(0.99), 0.95)
    assert (chosen.trial.number, chosen.meets) == (3, False)
    assert "none of which reaches 0.9405 (0.99 of the teacher's 0.9500)" in chosen.reason


def test_no_finished_trial_is_an_error_with_the_first_failure() -> None:
    with pytest.raises(SearchError, match="1 failed, 0 pruned.*First failure: out of memory"):
        choose_point(StudyResult((), FOUND.dropped), keeping(0.99), 0.9)


def test_a_trial_must_keep_retain_low_with_confidence() -> None:
    unsure, sure = finished(0, 0.9, 1.0), finished(1, 0.901, 2.0)
    unsure = replace(unsure, outcome=replace(unsure.outcome, kept_low=0.95))
    sure = replace(sure, outcome=replace(sure.outcome, kept_low=0.98))
    found = StudyResult((unsure, sure), ())
    chosen = choose_point(found, keeping(0.99, 0.97), 0.9)
    assert chosen.trial.number == 1
    assert "and of 0.97 of it with 95 % confidence" in chosen.reason
    assert choose_point(found, keeping(0.99, 0.95), 0.9).trial.number == 0
