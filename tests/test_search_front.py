"""The pure parts of the search: fronts, choices and hopeless trials, worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mlflow_pt_deploy.errors import PolicyError, SearchError
from mlflow_pt_deploy.search import (
    STATIC,
    TRANSFORMER,
    CompletedTrial,
    FailedTrial,
    Outcome,
    Space,
    StudyResult,
    TrialParams,
    choose_point,
    pareto,
)
from mlflow_pt_deploy.search.early_stopping import should_prune

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
        # three ways to be the best; the fourth loses to the second in accuracy alone
        ([(0.9, 3.0), (0.8, 2.0), (0.7, 1.0), (0.75, 2.0)], [2, 1, 0]),
        # equally accurate: the faster one
        ([(0.8, 2.0), (0.8, 1.0)], [1]),
        # equal in both: both, in their order, also in the middle of a front
        ([(0.9, 3.0), (0.8, 2.0), (0.7, 1.0), (0.8, 2.0)], [2, 1, 3, 0]),
    ],
)
def test_the_front_is_what_nothing_dominates(
    outcomes: list[tuple[float, float]], front: list[int]
) -> None:
    assert pareto([Outcome(*outcome) for outcome in outcomes]) == front


FOUND = StudyResult(
    (finished(0, 0.70, 0.1), finished(1, 0.891, 1.5), finished(3, 0.90, 4.0), finished(4, 0.8, 5)),
    (FailedTrial(2, POINT, "failed", "out of memory"),),
)


def test_the_fastest_that_keeps_the_accuracy_is_chosen() -> None:
    chosen = choose_point(FOUND, 0.99, 0.9)  # asks for 0.891
    assert (chosen.trial.number, chosen.meets) == (1, True)
    assert chosen.reason == (
        "Trial 1, a transformer student of 3 layers on onnxruntime-fp32 with 1 thread, answers in "
        "1.5 ms with a validation accuracy of 0.8910: the fastest of 4 finished trials with "
        "0.8910 (0.99 of the teacher's 0.9000) or more."
    )
    assert choose_point(FOUND, 0.5, 0.9).trial.number == 0
    assert choose_point(FOUND, 1.0, 0.9).trial.number == 3
    # 0.8 * 0.51 is 0.40800000000000003 in floating point, which is no reason to refuse 0.408
    assert choose_point(StudyResult((finished(0, 0.408, 1.0),), ()), 0.8, 0.51).meets


def test_where_nothing_keeps_the_accuracy_the_most_accurate_is_chosen_and_that_said() -> None:
    chosen = choose_point(FOUND, 0.99, 0.95)
    assert (chosen.trial.number, chosen.meets) == (3, False)
    assert "none of which reaches 0.9405 (0.99 of the teacher's 0.9500)" in chosen.reason


def test_nothing_finished_is_an_error_with_the_first_failure() -> None:
    with pytest.raises(SearchError, match="1 failed, 0 pruned.*first failure: out of memory"):
        choose_point(StudyResult((), FOUND.dropped), 0.99, 0.9)
    with pytest.raises(PolicyError, match="retain is 99"):
        choose_point(FOUND, 99, 0.9)


# Five trials of 4 epochs with 2 ms: after half of them they still gained 0.02, 0.04, ... 0.10.
FIVE = [
    finished(n, 0.80, 2.0, curve=((1, 0.5), (2, 0.80 - gain), (3, 0.79), (4, 0.80)))
    for n, gain in enumerate((0.02, 0.04, 0.06, 0.08, 0.10))
]


def test_a_trial_is_hopeless_if_the_largest_gain_does_not_bring_it_to_a_rival() -> None:
    # 0.69 + 0.10 = 0.79 < 0.80; with 0.71 it could still get to 0.81
    assert should_prune(POINT, [(1, 0.5), (2, 0.69)], FIVE) == (
        "0.6900 after epoch 2 of 4: no trial gained more than 0.1000 from there, and trial 0 has "
        "0.8000 and is no slower"
    )
    assert not should_prune(POINT, [(1, 0.5), (2, 0.71)], FIVE)
    assert not should_prune(POINT, [(1, 0.71), (2, 0.69)], FIVE), "the best epoch counts"
    # after the first quarter all have gained 0.30
    assert not should_prune(POINT, [(1, 0.51)], FIVE)
    assert not should_prune(POINT, [(4, 0.69)], FIVE), "nothing is left to save"


def test_shares_of_the_epochs_are_compared_not_their_numbers() -> None:
    long = replace(POINT, epochs=8)
    assert should_prune(long, [(4, 0.69)], FIVE)
    assert not should_prune(long, [(2, 0.69)], FIVE)
    short = [
        replace(trial, point=replace(POINT, epochs=2), curve=((1, 0.80 - 0.02 * n), (2, 0.80)))
        for n, trial in enumerate(FIVE, 1)
    ]
    assert should_prune(POINT, [(2, 0.69)], short)
    assert not should_prune(POINT, [(1, 0.1)], short)
    # before a quarter of its epochs nobody has reported, so nobody tells what can be gained
    assert not should_prune(long, [(1, 0.0)], FIVE)


def test_a_trial_is_compared_only_with_those_that_are_no_slower() -> None:
    bad = [(2, 0.1)]
    assert should_prune(replace(POINT, layers=4), bad, FIVE), "more layers are not faster"
    assert not should_prune(replace(POINT, layers=2), bad, FIVE), "fewer layers may be faster"
    assert not should_prune(replace(POINT, variant="openvino-int8"), bad, FIVE)
    assert not should_prune(replace(POINT, threads=2), bad, FIVE)
    # another variant of 3 layers took 1 ms, and 5 ms once: rivals with 2 ms may be slower than it
    other = replace(POINT, variant="openvino-int8")
    noisy = [finished(5, 0.3, 1.0, other), finished(6, 0.3, 5.0, other)]
    assert not should_prune(other, [(2, 0.25)], [*FIVE, *noisy])
    assert "trial 0 has 0.8" in should_prune(other, [(2, 0.25)], [*FIVE, noisy[1]])


def test_five_gains_of_the_same_kind_are_waited_for() -> None:
    bad = [(2, 0.1)]
    assert not should_prune(POINT, bad, FIVE[:4])
    static = replace(POINT, kind="static", layers=0)
    assert not should_prune(POINT, bad, [*FIVE[:4], replace(FIVE[4], point=static)])
    assert not should_prune(POINT, bad, [*FIVE[:4], replace(FIVE[4], curve=())])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": (4, 2)}, "layers is searched from 4 to 2"),
        ({"temperature": (0.0, 2.0)}, "temperature is searched from 0"),
        ({"epochs": (0, 2)}, "at least 1"),
        ({"soft_weight": (0.5, 1.5)}, "soft_weight goes up to 1.5"),
        ({"variants": ()}, "variants is .*at least one"),
        ({"batch_size": (8, 8)}, "batch_size is .*each once"),
    ],
)
def test_ranges_that_make_no_sense(change: dict[str, tuple[float, float]], message: str) -> None:
    with pytest.raises(SearchError, match=message):
        replace(TRANSFORMER, **change)  # type: ignore[arg-type]  # what the test is about


def test_spaces_and_outcomes_that_make_no_sense() -> None:
    with pytest.raises(SearchError, match="the space is empty"):
        Space(None, None)
    with pytest.raises(SearchError, match="a transformer has at least 1"):
        Space(transformer=STATIC)
    with pytest.raises(SearchError, match="a static student has none"):
        Space(static=TRANSFORMER)
    with pytest.raises(SearchError, match="accuracy is nan"):
        Outcome(float("nan"), 1.0)
    with pytest.raises(SearchError, match="latency_ms is 0"):
        Outcome(0.5, 0.0)
