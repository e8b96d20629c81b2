"""The chosen variant against the current champion; 100 validation rows each."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mlflow_pt_deploy.errors import PolicyError
from mlflow_pt_deploy.evaluation import Measurement, Result
from mlflow_pt_deploy.selection.challenge import Measured, challenge
from mlflow_pt_deploy.selection.policy import Policy

HERE = {"validation": "1a2b3c4d", "hardware": "a cpu, 2 cores"}


def measured(
    correct: int,
    *,
    mean_ms: float = 2.0,
    speedup: tuple[float, float, float] = (10, 9, 11),
    rate: float = 100.0,
    mb: float = 5.0,
    run: str = "run",
) -> Measured:
    """A variant with the first `correct` of 100 rows correct."""
    samples = (1.0,) * correct + (0.0,) * (100 - correct)
    value, low, high = speedup
    measurements = (
        Measurement("latency_mean_ms", mean_ms, "ms"),
        Measurement("speedup", value, "x", low=low, high=high),
        Measurement("throughput_rows_per_s", rate, "rows/s"),
        Measurement("artifact_mb", mb, "MB"),
        Measurement("accuracy", correct / 100, "fraction", "validation", samples=samples),
    )
    result = Result("a-b-c", "a", "b", "c", "cpu", 2, None, "", measurements, "teacher-eager-fp32")
    return Measured(result, run, HERE)


def test_a_better_one_replaces_the_champion() -> None:
    verdict = challenge(measured(90, speedup=(20, 18, 22)), measured(90), Policy())
    assert verdict.replaces
    assert verdict.reason == (
        "its latency is better: 20x against 10x; accuracy 0.9000 against 0.9000, difference +0.00 "
        "points [-1.92, +1.92], McNemar p 1"
    )


def test_shown_to_be_less_accurate() -> None:
    verdict = challenge(measured(80, speedup=(20, 18, 22)), measured(90), Policy())
    assert not verdict.replaces
    assert verdict.reason.startswith(
        "it is less accurate beyond noise: accuracy 0.8000 against 0.9"
    )
    assert "difference -10.00 points [-15" in verdict.reason
    assert "McNemar p 0.002" in verdict.reason


def test_not_better_beyond_noise_in_the_same_run() -> None:
    tied = measured(90, speedup=(10.5, 9.5, 11.5))  # the interval holds the champion's speedup
    assert not challenge(tied, measured(90), Policy()).replaces
    assert challenge(measured(90, rate=101), measured(90), Policy(objective="throughput")).replaces


@pytest.mark.parametrize(
    ("better", "policy"),
    [
        ({"mean_ms": 1.8}, Policy()),
        ({"rate": 110}, Policy(objective="throughput")),
        ({"mb": 4.5}, Policy(objective="size")),
        ({"rate": 110}, Policy(objective="cost", price_per_core_hour=1)),
    ],
)
def test_timings_of_two_runs_need_a_margin(better: dict, policy: Policy) -> None:
    champion = measured(90, run="earlier")
    assert challenge(measured(90, **better), champion, policy).replaces
    slightly = {"mean_ms": 1.95, "rate": 103, "mb": 4.9}
    verdict = challenge(measured(90, **slightly), champion, policy)
    assert not verdict.replaces
    assert f"its {policy.objective} is not better beyond noise" in verdict.reason


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({"validation": "other"}, r"other validation rows \(other instead of 1a2b3c4d\)"),
        ({"hardware": "an H200"}, r"other hardware \(an H200 instead of a cpu, 2 cores\)"),
        ({"validation": None}, r"other validation rows \(unknown instead of"),
    ],
)
def test_other_conditions_cannot_be_compared(conditions: dict, message: str) -> None:
    champion = replace(measured(90), conditions={**HERE, **conditions})
    with pytest.raises(PolicyError, match=message + r".*pt-deploy compare --data.*--replace"):
        challenge(measured(90), champion, Policy())


def test_missing_measurements_are_named() -> None:
    champion = measured(90, run="earlier")
    without = replace(champion.result, measurements=champion.result.measurements[:-1])
    with pytest.raises(PolicyError, match="a-b-c has no answers for single validation rows"):
        challenge(measured(90), replace(champion, result=without), Policy())
    without = replace(champion.result, measurements=champion.result.measurements[1:])
    with pytest.raises(PolicyError, match="a-b-c has no latency_mean_ms"):
        challenge(measured(90), replace(champion, result=without), Policy())
