"""Compare results by the objective of a policy, with their noise."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mlflow_pt_deploy.evaluation.result import Measurement, Result
from mlflow_pt_deploy.selection.policy import Policy
from mlflow_pt_deploy.system.device import CPU

_ALWAYS = (
    ("latency_p50_ms", ""),
    ("throughput_rows_per_s", ""),
    ("artifact_mb", ""),
    ("accuracy", "validation"),
    ("accuracy_drop", "validation"),
)


def unusable_reason(result: Result, policy: Policy, limited: Sequence[tuple[str, str]]) -> str:
    """Explain why a result cannot be selected; empty if it can.

    Args:
        result: Of one variant.
        policy: Its `retain_low` needs `accuracy_kept`.
        limited: Metrics that the policy limits, with their datasets.
    """
    if result.reason:
        return f"failed: {result.reason}"
    needed = [*_ALWAYS, *limited]
    if policy.retain_low:
        needed.append(("accuracy_kept", "validation"))
    missing = [name for name, dataset in needed if result.get(name, dataset) is None]
    return f"not measured: {', '.join(dict.fromkeys(missing))}" if missing else ""


def required_value(result: Result, name: str, dataset: str = "") -> float:
    """Return a metric that `unusable_reason` has checked to exist."""
    value = result.value(name, dataset)
    assert value is not None, name
    return value


def accuracies(result: Result) -> tuple[float, float]:
    """Return the validation accuracy of the variant and of its baseline."""
    accuracy = required_value(result, "accuracy", "validation")
    return accuracy, accuracy + required_value(result, "accuracy_drop", "validation")


def overall_speedup(result: Result) -> Measurement | None:
    """Return the speedup over the baseline of the CPU, which compares variants of all devices."""
    return result.get("speedup_over_cpu") or result.get("speedup")


def speedup_interval(result: Result) -> tuple[float, float] | None:
    """Return the 95 % interval of `overall_speedup`, or None."""
    return _interval(overall_speedup(result))


def _interval(speedup: Measurement | None) -> tuple[float, float] | None:
    if speedup is None or speedup.low is None or speedup.high is None:
        return None
    return speedup.low, speedup.high


def slowest_rate(rate: Measurement) -> float:
    """Return the lowest measured rows per second."""
    return min(rate.samples, default=rate.value)


def cost(result: Result, policy: Policy) -> float:
    """Return a number that is smaller for a better result."""
    if policy.objective == "size":
        return required_value(result, "artifact_mb")
    if policy.objective == "cost":
        return price_per_million_rows(result, policy)
    if policy.objective == "latency":
        # Not the median latency: for a cascade it does not include deferred rows, and medians
        # measured minutes apart on a noisy machine are not comparable, while speedups are.
        speedup = overall_speedup(result)
        return 1 / speedup.value if speedup and speedup.value else math.inf
    return -required_value(result, "throughput_rows_per_s")


def price_per_million_rows(result: Result, policy: Policy) -> float:
    """Return the price of the cores, and of the GPU, that score a million rows in batches."""
    per_hour = result.threads * (policy.price_per_core_hour or 0.0)
    if result.device != CPU:
        per_hour += policy.price_per_gpu_hour or 0.0
    return per_hour * 1e6 / required_value(result, "throughput_rows_per_s") / 3600


def is_tied(one: Result, best: Result, policy: Policy) -> bool:
    """Whether the difference to the best result is within noise."""
    if policy.objective != "latency":
        return cost(one, policy) == cost(best, policy)
    if one.device == best.device:  # timed against the same baseline
        interval, speedup = _interval(best.get("speedup")), one.get("speedup")
    else:
        interval, speedup = speedup_interval(best), overall_speedup(one)
    # Only the interval of the best one counts: a noisy variant must not tie by a wide interval.
    return interval is not None and speedup is not None and interval[0] <= speedup.value


def beats_baseline(result: Result, allowed: Sequence[Result], policy: Policy) -> bool:
    """Whether the result is better than the baseline beyond noise."""
    if result.variant == result.baseline:
        return False
    if policy.objective == "size":
        baseline = [each for each in allowed if each.variant == each.baseline]
        return all(cost(result, policy) < cost(each, policy) for each in baseline)
    if policy.objective == "latency":
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
