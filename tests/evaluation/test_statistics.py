"""Statistics; expected values are derived by hand in the comments."""

from __future__ import annotations

import numpy as np
import pytest

from mlflow_pt_deploy.evaluation.statistics import macro_f1, paired_drop, paired_speedup, percentile


def test_percentile_interpolates_between_order_statistics() -> None:
    # position 0.95 * (5 - 1) = 3.8 between 40 and 50
    assert percentile([50, 10, 30, 20, 40], 95) == pytest.approx(48)
    assert percentile([50, 10, 30, 20, 40], 50) == 30
    assert percentile([7], 99) == 7


def test_speedup_is_the_median_and_ignores_an_outlier() -> None:
    speedup = paired_speedup([2.0, 2.1, 1.9, 2.0, 40.0, 2.05, 1.95])
    assert speedup.value == 2.0
    assert 1.9 <= speedup.low <= 2.0 <= speedup.high < 40


def test_the_interval_of_five_rounds_is_about_their_range() -> None:
    # The bootstrap median of 1..5 is 1 only if three of five draws are 1: probability 5.8 %
    # (10 * .008 * .64 + 5 * .0016 * .8 + .00032), so the 2.5 % quantile is 1, and the other end 5.
    assert paired_speedup([1, 2, 3, 4, 5]) == (3, 1, 5)


def test_equal_rounds_give_an_empty_interval() -> None:
    assert paired_speedup([3.0] * 8) == (3, 3, 3)


def test_the_same_rounds_give_the_same_interval() -> None:
    ratios = np.random.default_rng(0).normal(1, 0.1, 30).tolist()
    assert paired_speedup(ratios) == paired_speedup(ratios)
    assert paired_speedup(ratios).low < 1 < paired_speedup(ratios).high


def flags(*counts: tuple[bool, int]) -> np.ndarray:
    return np.concatenate([np.full(count, value) for value, count in counts])


def test_drop_counts_rows_on_which_exactly_one_is_correct() -> None:
    # 100 rows: both correct 80, losses 10, gains 4, both wrong 6; value (10 - 4) / 100.
    # Agresti & Min: n = 102, net = 6, differing = 10.5 + 4.5 = 15;
    # centre 6 / 102 = 0.0588; half 1.96 * sqrt(15 - 36 / 102) / 102 = 0.0735.
    reference = flags((True, 90), (False, 10))
    variant = flags((True, 80), (False, 10), (True, 4), (False, 6))
    drop = paired_drop(reference, variant)
    assert drop.value == pytest.approx(0.06)
    assert drop.low == pytest.approx(-0.0147, abs=2e-4)
    assert drop.high == pytest.approx(0.1324, abs=2e-4)


def test_without_disagreement_the_interval_is_not_empty() -> None:
    # half = 1.96 * sqrt(0.5 + 0.5) / (98 + 2) = 0.0196
    correct = np.ones(98, dtype=bool)
    assert paired_drop(correct, correct) == pytest.approx((0, -0.0196, 0.0196), abs=1e-4)


@pytest.mark.parametrize("rows", [1, 2, 50])
@pytest.mark.parametrize("variant_right", [True, False])
def test_extreme_drops_lie_inside_their_bounded_interval(rows: int, variant_right: bool) -> None:
    variant = np.full(rows, variant_right)
    drop = paired_drop(~variant, variant)
    assert -1 <= drop.low <= drop.value <= drop.high <= 1
    assert drop.value == (-1 if variant_right else 1)


def test_macro_f1_of_small_examples() -> None:
    targets = np.array([0, 0, 1, 1])
    # class 0: TP 2, no error -> 1; class 1: TP 1, FN 1 -> 2/3; class 2: TP 0, FP 1 -> 0
    predicted = np.array([0, 0, 1, 2])
    assert macro_f1(targets, predicted) == pytest.approx((1 + 2 / 3 + 0) / 3)
    # class 0: TP 2, FP 1 -> 4/5; class 1: TP 1, FN 1 -> 2/3
    predicted = np.array([0, 0, 1, 0])
    assert macro_f1(targets, predicted) == pytest.approx((4 / 5 + 2 / 3) / 2)


def test_macro_f1_ignores_an_absent_class() -> None:
    assert macro_f1(np.array([0, 5]), np.array([0, 5])) == 1


def test_macro_f1_agrees_with_scikit_learn() -> None:
    from sklearn.metrics import f1_score

    targets, predicted = np.random.default_rng(3).integers(7, size=(2, 200))
    expected = f1_score(targets, predicted, average="macro")
    assert macro_f1(targets, predicted) == pytest.approx(expected)
