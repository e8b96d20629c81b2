"""Statistics; expected values are derived by hand in the comments."""

from __future__ import annotations

import numpy as np
import pytest

from mlflow_pt_deploy.evaluation.statistics import (
    Estimate,
    calibration_error,
    lowest_recall,
    macro_f1,
    mcnemar_p,
    paired_drop,
    paired_ratio,
    paired_speedup,
    percentile,
    product,
    proportion,
)


def test_percentile_interpolates_between_order_statistics() -> None:
    # position 0.95 * (5 - 1) = 3.8 between 40 and 50
    assert percentile([50, 10, 30, 20, 40], 95) == pytest.approx(48)
    assert percentile([50, 10, 30, 20, 40], 50) == 30
    assert percentile([7], 99) == 7


def test_the_interval_of_a_product() -> None:
    exact = Estimate(5.0, 5.0, 5.0)
    assert product(Estimate(2.0, 1.0, 4.0), exact) == pytest.approx((10.0, 5.0, 20.0))
    # factors of 8 and 16 down and up: 3 and 4 powers of two, so 5 of the product
    found = product(Estimate(1.0, 1 / 8, 8.0), Estimate(1.0, 1 / 16, 16.0))
    assert found == pytest.approx((1.0, 1 / 32, 32.0))


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


def correct(*counts: int) -> tuple[np.ndarray, np.ndarray]:
    """Reference and variant: rows that both, the first, the second or none predicts correctly."""
    reference = np.repeat([True, True, False, False], counts)
    variant = np.repeat([True, False, True, False], counts)
    return reference, variant


def test_the_kept_share_and_its_bound() -> None:
    value, low = paired_ratio(*correct(170, 10, 4, 16))
    assert value == pytest.approx(174 / 180)
    # Fieller by hand: the bound solves (v - r b)^2 = z^2 / n * var(v - r b) with half a row added
    n, both, v, b = 202, 170.5, 175 / 202, 181 / 202
    variance = v * (1 - v) - 2 * low * (both / n - v * b) + low**2 * b * (1 - b)
    assert (v - low * b) ** 2 == pytest.approx(1.6448536269514722**2 / n * variance)
    assert low < value


def test_equal_answers_are_certain_only_with_enough_rows() -> None:
    assert [paired_ratio(*correct(9 * n, 0, 0, n))[1] for n in (1, 2, 20, 200)] == pytest.approx(
        [0.8452, 0.9163, 0.9909, 0.9991], abs=1e-3
    )


def test_a_reference_without_correct_rows() -> None:
    assert paired_ratio(*correct(0, 0, 3, 3)) == (1.0, 0.0)
    assert paired_ratio(*correct(1, 0, 0, 50))[1] == 0


@pytest.mark.parametrize(("differing", "loss"), [(0.02, 0.01), (0.2, 0.05)])
def test_the_bound_holds_in_about_95_percent_of_samples(differing: float, loss: float) -> None:
    random, rows, missed = np.random.default_rng(0), 300, 0
    truth = (0.9 - loss) / 0.9
    for _ in range(1000):
        draw = random.random(rows)
        reference = draw < 0.9
        lost, won = draw < (differing + loss) / 2, draw >= 1 - (differing - loss) / 2
        missed += paired_ratio(reference, (reference & ~lost) | won)[1] > truth
    assert missed / 1000 < 0.08


def test_mcnemar_is_the_binomial_test_of_the_differing_rows() -> None:
    assert mcnemar_p(*correct(50, 8, 1, 9)) == pytest.approx(2 * (1 + 9) / 2**9)
    assert mcnemar_p(*correct(50, 0, 0, 9)) == 1


def test_wilson_interval() -> None:
    # Wilson's worked value for 60 of 64
    assert proportion(60, 64) == pytest.approx((0.9375, 0.8500, 0.9754), abs=1e-4)
    assert proportion(4, 4).high == 1
    assert proportion(0, 4).low == 0


def test_calibration_error_by_hand() -> None:
    confidence = np.array([0.95, 0.95, 0.55, 0.55], dtype=np.float32)
    right = np.array([True, True, True, False])
    # two bins: |1 - 0.95| and |0.5 - 0.55|, half of the rows each
    assert calibration_error(confidence, right) == pytest.approx(0.05, abs=1e-6)


def test_lowest_recall_leaves_out_rare_classes() -> None:
    targets = np.repeat([0, 1, 2], [10, 5, 2])
    predicted = targets.copy()
    predicted[:3] = 1
    predicted[-2:] = 0
    assert lowest_recall(targets, predicted) == pytest.approx(0.7)
    assert lowest_recall(targets[-4:], predicted[-4:]) == pytest.approx(0.5)
