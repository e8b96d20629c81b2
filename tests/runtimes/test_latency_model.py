"""Online fit of the latency model."""

import random

import pytest

from mlflow_pt_deploy.runtimes.latency_model import LatencyModel


def test_overhead_and_time_per_item_are_separated() -> None:
    model, generator = LatencyModel(), random.Random(0)
    for _ in range(100):
        rows = generator.choice([1, 2, 4, 16])
        model.observe(rows, (5e-3 + rows * 1e-3) * generator.uniform(0.95, 1.05))
    assert model.predict_s(1, 16) == pytest.approx(6e-3, rel=0.1)
    assert model.predict_s(64, 16) == pytest.approx(84e-3, rel=0.1)
    assert model.predict_s(64, 64) == pytest.approx(69e-3, rel=0.1)
    assert model.predict_s(0, 16) == 0


def test_calls_of_one_size_keep_the_ratio_and_follow_the_speed() -> None:
    model = LatencyModel()
    for rows in (1, 4, 16, 1, 4, 16):
        model.observe(rows, 5e-3 + rows * 1e-3)
    for _ in range(300):
        model.observe(1, 12e-3)  # half the speed from here on, and one row per call
    assert model.predict_s(1, 16) == pytest.approx(12e-3, rel=0.01)
    assert 20e-3 < model.predict_s(16, 16) < 60e-3


def test_all_time_is_overhead_before_the_first_fit() -> None:
    model = LatencyModel()
    assert model.predict_s(1000, 16) == 0
    model.observe(1, 0.2)
    assert model.predict_s(40, 64) == pytest.approx(0.2)


@pytest.mark.parametrize("calls", [[(1, 9e-3), (16, 1e-3)], [(1, 1e-6), (16, 1.0)]])
def test_no_coefficient_is_negative(calls: list[tuple[int, float]]) -> None:
    model = LatencyModel()
    for rows, seconds in calls * 20:
        model.observe(rows, seconds)
    assert model.overhead_s >= 0
    assert model.per_item_s >= 0
