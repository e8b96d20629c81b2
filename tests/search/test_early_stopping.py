"""Early stopping of trials, with cases worked out by hand."""

from __future__ import annotations

from dataclasses import replace

from mlflow_pt_deploy.search import CompletedTrial, Outcome, TrialParams
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


# Five trials of 4 epochs and 2 ms. After half of the epochs they gained 0.02, 0.04, ... 0.10.
FIVE = [
    finished(n, 0.80, 2.0, curve=((1, 0.5), (2, 0.80 - gain), (3, 0.79), (4, 0.80)))
    for n, gain in enumerate((0.02, 0.04, 0.06, 0.08, 0.10))
]


def test_trial_stops_if_the_largest_gain_is_not_enough() -> None:
    # 0.69 + 0.10 = 0.79 < 0.80, but 0.71 could still reach 0.81
    assert should_prune(POINT, [(1, 0.5), (2, 0.69)], FIVE) == (
        "accuracy 0.6900 after epoch 2 of 4: no trial gained more than 0.1000 from there, and "
        "trial 0, which is no slower, has 0.8000"
    )
    assert not should_prune(POINT, [(1, 0.5), (2, 0.71)], FIVE)
    assert not should_prune(POINT, [(1, 0.71), (2, 0.69)], FIVE), "the best epoch counts"
    # after the first quarter all gained 0.30
    assert not should_prune(POINT, [(1, 0.51)], FIVE)
    assert not should_prune(POINT, [(4, 0.69)], FIVE), "no epoch is left"


def test_shares_of_the_epochs_are_compared() -> None:
    long = replace(POINT, epochs=8)
    assert should_prune(long, [(4, 0.69)], FIVE)
    assert not should_prune(long, [(2, 0.69)], FIVE)
    short = [
        replace(trial, point=replace(POINT, epochs=2), curve=((1, 0.80 - 0.02 * n), (2, 0.80)))
        for n, trial in enumerate(FIVE, 1)
    ]
    assert should_prune(POINT, [(2, 0.69)], short)
    assert not should_prune(POINT, [(1, 0.1)], short)
    # before a quarter of the epochs no trial has a report, so no gain is known
    assert not should_prune(long, [(1, 0.0)], FIVE)


def test_only_trials_that_are_no_slower_are_compared() -> None:
    bad = [(2, 0.1)]
    assert should_prune(replace(POINT, layers=4), bad, FIVE), "more layers are not faster"
    assert not should_prune(replace(POINT, layers=2), bad, FIVE), "fewer layers may be faster"
    assert not should_prune(replace(POINT, variant="openvino-int8"), bad, FIVE)
    assert not should_prune(replace(POINT, threads=2), bad, FIVE)
    # another variant of 3 layers took 1 ms, and 5 ms once: the trials of 2 ms may be slower
    other = replace(POINT, variant="openvino-int8")
    noisy = [finished(5, 0.3, 1.0, other), finished(6, 0.3, 5.0, other)]
    assert not should_prune(other, [(2, 0.25)], [*FIVE, *noisy])
    assert "trial 0, which is no slower, has 0.8" in should_prune(
        other, [(2, 0.25)], [*FIVE, noisy[1]]
    )


def test_five_gains_of_the_same_kind_are_required() -> None:
    bad = [(2, 0.1)]
    assert not should_prune(POINT, bad, FIVE[:4])
    static = replace(POINT, kind="static", layers=0)
    assert not should_prune(POINT, bad, [*FIVE[:4], replace(FIVE[4], point=static)])
    assert not should_prune(POINT, bad, [*FIVE[:4], replace(FIVE[4], curve=())])
