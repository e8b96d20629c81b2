"""Drift: the stability index and its interval on known distributions, and verdicts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from mlflow_pt_deploy.errors import ModelError
from mlflow_pt_deploy.evaluation.drift import (
    LIMIT,
    MOVED,
    SAME,
    TOO_FEW,
    compare,
    overall,
    stability_index,
)
from mlflow_pt_deploy.evaluation.profile import Profile, RowCounts

DRAWS = 1000
SKEWED = np.array([0.001, 0.004, 0.015, 0.08, 0.9])
EVEN = np.full(20, 0.05)


def moved(shares: npt.NDArray[np.float64], by: float) -> npt.NDArray[np.float64]:
    """Shares of which a part is swapped with the opposite bucket."""
    return (1 - by) * shares + by * shares[::-1]


def tilted(by: float) -> npt.NDArray[np.float64]:
    shares = np.exp(by * np.linspace(-1, 1, 20))
    return shares / shares.sum()


def true_index(p: npt.NDArray[np.float64], q: npt.NDArray[np.float64]) -> float:
    return float(((p - q) * np.log(p / q)).sum())


def draws(
    p: npt.NDArray[np.float64], q: npt.NDArray[np.float64], rows: tuple[int, int]
) -> npt.NDArray[np.float64]:
    """Value, low and high of many samples, (draws, 3)."""
    source = np.random.default_rng(0)
    pairs = zip(
        source.multinomial(rows[0], p, DRAWS), source.multinomial(rows[1], q, DRAWS), strict=True
    )
    return np.array([stability_index(*pair) for pair in pairs])


@pytest.mark.parametrize("shares", [EVEN, SKEWED, np.array([0.3, 0.7])])
@pytest.mark.parametrize("rows", [(400, 1000), (3000, 300)])
def test_equal_distributions_raise_no_alarm(
    shares: npt.NDArray[np.float64], rows: tuple[int, int]
) -> None:
    value, low, high = draws(shares, shares, rows).T
    assert (low > LIMIT).sum() == 0
    assert (low > 0).mean() < 0.04  # 2.5 % is claimed
    assert np.median(value) < 0.01 and (high <= LIMIT).mean() > 0.8


@pytest.mark.parametrize(
    ("p", "q"),
    [(EVEN, tilted(0.4)), (EVEN, tilted(1.0)), (SKEWED, moved(SKEWED, 0.02))],
)
def test_the_interval_covers_the_true_index(
    p: npt.NDArray[np.float64], q: npt.NDArray[np.float64]
) -> None:
    value, low, high = draws(p, q, (2000, 4000)).T
    true = true_index(p, q)
    assert ((low <= true) & (true <= high)).mean() > 0.93
    assert abs(value.mean() - true) < 0.1 * true


def test_a_true_shift_is_found() -> None:
    _, low, _ = draws(EVEN, tilted(1.0), (400, 1000)).T
    assert (low > LIMIT).mean() > 0.95


def test_a_new_label_and_a_vanished_one_are_found() -> None:
    assert stability_index([500, 500, 0], [500, 0, 500]).low > 1
    assert stability_index([0, 1000], [200, 800]).low > LIMIT


def test_samples_that_are_equal_are_not_sure_beyond_their_size() -> None:
    few, many = stability_index([50, 50], [50, 50]), stability_index([5000, 5000], [5000, 5000])
    assert few.value == few.low == 0
    assert few.high > 10 * many.high > 0
    assert stability_index([1000, 0], [1000, 0]).high < 0.02


def profile(labels: list[int], *, score: float = 0.9, length: int = 5, unknown: int = 0) -> Profile:
    counts = RowCounts()
    row = [7] * (length - unknown) + [1] * unknown
    for at, rows in enumerate(labels):
        counts.count_rows([(at, score)] * rows, [[row] * rows], unknown_id=1)
    return Profile.of(counts)


USUAL = profile([600, 300, 100])


@pytest.mark.parametrize(
    ("served", "kind"),
    [
        (profile([100, 300, 600]), "labels"),
        (profile([600, 300, 100], score=0.6), "scores"),
        (profile([600, 300, 100], length=60), "lengths"),
        (profile([600, 300, 100], unknown=1), "unknown"),
    ],
)
def test_the_kind_that_moved_is_named(served: Profile, kind: str) -> None:
    shifts = compare(USUAL, served)
    assert [shift.kind for shift in shifts] == ["labels", "scores", "lengths", "unknown"]
    assert [shift.kind for shift in shifts if shift.verdict == MOVED] == [kind]
    assert {shift.verdict for shift in shifts} == {SAME, MOVED}
    assert overall(shifts) == MOVED


def test_the_same_rows_are_the_same() -> None:
    assert overall(compare(USUAL, profile([50, 30, 10]))) == TOO_FEW
    assert overall(compare(USUAL, profile([600, 300, 100]))) == SAME
    assert overall(compare(profile([6, 3, 1]), USUAL)) == TOO_FEW


def test_images_have_no_lengths() -> None:
    counts = RowCounts()
    counts.count_rows([(0, 0.9)] * 500, ())
    shifts = compare(Profile.of(counts), Profile.of(counts))
    assert [shift.kind for shift in shifts] == ["labels", "scores"]
    assert overall(shifts) == SAME


def test_nothing_served_has_no_shifts() -> None:
    assert compare(USUAL, replace(profile([0, 0, 0]), classes=3)) == []
    assert overall([]) == TOO_FEW


def test_another_number_of_classes_is_refused() -> None:
    with pytest.raises(ModelError, match="has 3 classes and the served rows have 2"):
        compare(USUAL, profile([5, 5]))
