"""What a call costs, learned while serving."""

import random

import pytest

from mlflow_pt_deploy.runtimes.latency_model import Cost


def test_the_cost_of_a_call_is_told_from_that_of_its_rows() -> None:
    cost, chance = Cost(), random.Random(0)
    for _ in range(100):
        rows = chance.choice([1, 2, 4, 16])
        cost.saw(rows, (5e-3 + rows * 1e-3) * chance.uniform(0.95, 1.05))
    assert cost.of(1, 16) == pytest.approx(6e-3, rel=0.1)
    assert cost.of(64, 16) == pytest.approx(84e-3, rel=0.1)
    assert cost.of(64, 64) == pytest.approx(69e-3, rel=0.1)
    assert cost.of(0, 16) == 0


def test_calls_of_one_size_keep_the_proportion_and_follow_the_speed() -> None:
    cost = Cost()
    for rows in (1, 4, 16, 1, 4, 16):
        cost.saw(rows, 5e-3 + rows * 1e-3)
    for _ in range(300):
        cost.saw(1, 12e-3)  # half as fast from here on, and one row at a time
    assert cost.of(1, 16) == pytest.approx(12e-3, rel=0.01)
    assert 20e-3 < cost.of(16, 16) < 60e-3


def test_on_a_guess_nobody_is_refused() -> None:
    cost = Cost()
    assert cost.of(1000, 16) == 0
    cost.saw(1, 0.2)
    assert cost.of(40, 64) == pytest.approx(0.2)


@pytest.mark.parametrize("calls", [[(1, 9e-3), (16, 1e-3)], [(1, 1e-6), (16, 1.0)]])
def test_no_part_is_ever_negative(calls: list[tuple[int, float]]) -> None:
    cost = Cost()
    for rows, seconds in calls * 20:
        cost.saw(rows, seconds)
    assert cost.call_s >= 0
    assert cost.each_s >= 0


@pytest.mark.parametrize("most", [1, 16])
def test_what_surely_takes_no_longer_is_no_more_and_hardly_less(most: int) -> None:
    cost = Cost()
    for rows in (1, 4, 16, 1, 4, 16):
        cost.saw(rows, 5e-3 + rows * 1e-3)
    for seconds in (0.0, 4e-3, 10e-3, 0.1, 1.0):
        rows = int(cost.within(seconds, most))
        assert cost.of(rows, most) <= seconds or rows == 0
        assert cost.of(rows + most + 1, most) > seconds


def test_of_what_is_not_known_any_number_may_come() -> None:
    assert Cost().within(0.1, 16) == float("inf")
