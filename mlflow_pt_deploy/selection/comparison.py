"""Compare results by latency or throughput, with their noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from mlflow_pt_deploy.evaluation.result import Measurement, Result

Objective = Literal["latency", "throughput"]


def unusable_reason(result: Result, limited: Sequence[str]) -> str:
    """Explain why a result cannot be selected; empty if it can.

    Args:
        result: Of one variant.
        limited: Metrics that the policy may limit.
    """
    if result.reason:
        return f"failed: {result.reason}"
    needed = ["latency_p50_ms", "throughput_rows_per_s", *limited]
    missing = [name for name in needed if result.get(name) is None]
    missing += [n for n in ("accuracy", "accuracy_drop") if result.get(n, "validation") is None]
    return f"not measured: {', '.join(missing)}" if missing else ""


def required_value(result: Result, name: str, dataset: str = "") -> float:
    """Return a metric that `unusable_reason` has checked to exist."""
    value = result.value(name, dataset)
    assert value is not None, name
    return value


def accuracies(result: Result) -> tuple[float, float]:
    """Return the validation accuracy of the variant and of its baseline."""
    accuracy = required_value(result, "accuracy", "validation")
    return accuracy, accuracy + required_value(result, "accuracy_drop", "validation")


def speedup_interval(result: Result) -> tuple[float, float] | None:
    """Return the 95 % interval of the speedup, or None."""
    speedup = result.get("speedup")
    if speedup is None or speedup.low is None or speedup.high is None:
        return None
    return speedup.low, speedup.high


def slowest_rate(rate: Measurement) -> float:
    """Return the lowest measured rows per second."""
    return min(rate.samples, default=rate.value)


def cost(result: Result, objective: Objective) -> float:
    """Return a number that is smaller for a better result."""
    if objective == "latency":
        # Not the median latency: for a cascade it does not include deferred rows, and medians
        # measured minutes apart on a noisy machine are not comparable, while speedups are.
        speedup = result.value("speedup")
        return 1 / speedup if speedup else math.inf
    return -required_value(result, "throughput_rows_per_s")


def is_tied(one: Result, best: Result, objective: Objective) -> bool:
    """Whether the difference to the best result is within noise."""
    if objective == "throughput":
        return cost(one, objective) == cost(best, objective)
    interval, speedup = speedup_interval(best), one.value("speedup")
    # Only the interval of the best one counts: a noisy variant must not tie by a wide interval.
    return interval is not None and speedup is not None and interval[0] <= speedup


def beats_baseline(result: Result, allowed: Sequence[Result], objective: Objective) -> bool:
    """Whether the result is better than the baseline beyond noise."""
    if result.variant == result.baseline:
        return False
    if objective == "latency":
        interval = speedup_interval(result)
        return interval is not None and interval[0] > 1
    rate = result.get("throughput_rows_per_s")
    baselines = [
        each.get("throughput_rows_per_s") for each in allowed if each.variant == each.baseline
    ]
    return rate is not None and all(
        slowest_rate(rate) > max(baseline.samples, default=baseline.value)
        for baseline in baselines
        if baseline is not None
    )
