"""Select a variant by a policy, and explain the selection.

Uses validation measurements only. Test rows never influence the selection, so that the test
accuracy of the selected variant is unbiased.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mlflow_pt_deploy.evaluation.result import Result
from mlflow_pt_deploy.selection.comparison import (
    accuracies,
    cost,
    is_tied,
    overall_speedup,
    required_value,
    slowest_rate,
    speedup_interval,
    unusable_reason,
)
from mlflow_pt_deploy.selection.explanation import (
    Violation,
    explain_choice,
    explain_no_choice,
    explain_undecided,
    quality_warning,
)
from mlflow_pt_deploy.selection.policy import LIMITS, LimitSpec, Policy
from mlflow_pt_deploy.system.device import CPU

_MAX_ROWS = 1_000_000  # more rows than this decide nothing in practice


@dataclass(frozen=True)
class Choice:
    """The selected variant and the reason.

    Attributes:
        variant: Name of the variant, or None if no variant meets the limits.
        reason: Explanation in one paragraph.
        considered: Each variant with why it was kept or excluded, in the order of the results.
        runner_up: Name of the best other variant that meets the limits, or None.
    """

    variant: str | None
    reason: str
    considered: tuple[tuple[str, str], ...]
    runner_up: str | None = None


def choose(results: Sequence[Result], policy: Policy) -> Choice:
    """Select the best variant that meets the limits.

    For ``latency``, a variant whose speedup lies within the interval of the fastest is tied with
    it. Ties are resolved by higher validation accuracy, then by smaller artifact, then by name.

    Args:
        results: From `measure`; failed results are skipped.
        policy: Limits and objective.

    Raises:
        PolicyError: The objective is the cost, and the price of a GPU is missing.
    """
    if any(each.device != CPU and not each.reason for each in results):
        policy.check_gpu_price()
    violations = {
        each.variant: _violations(each, policy) for each in results if not _unusable(each, policy)
    }
    allowed = [each for each in results if violations.get(each.variant) == []]
    if not allowed:
        reason = explain_no_choice(violations)
        return Choice(None, reason, _considered(results, violations, [], None, policy))
    ranked = sorted(allowed, key=lambda each: cost(each, policy))
    best = ranked[0]
    tied = [each for each in allowed if each is best or is_tied(each, best, policy)]
    chosen = min(tied, key=_preference)
    reason = explain_choice(chosen, tied, allowed, policy)
    others = [each.variant for each in ranked if each is not chosen]
    return Choice(
        chosen.variant,
        quality_warning(chosen, results) + reason + _undecided(results, chosen, violations, policy),
        _considered(results, violations, tied, chosen, policy),
        others[0] if others else None,
    )


def finalists(results: Sequence[Result], policy: Policy, count: int = 2) -> list[str]:
    """Return the names of the best variants that meet the limits, best first."""
    usable = [
        each for each in results if not _unusable(each, policy) and not _violations(each, policy)
    ]
    best = sorted(usable, key=lambda each: cost(each, policy))
    return [each.variant for each in best[:count]]


def not_slower_than(one: Result, other: Result) -> bool:
    """Whether `one` is not slower than `other` beyond noise, for single rows and in batches."""
    speedup, interval = overall_speedup(one), speedup_interval(other)
    rate, other_rate = one.get("throughput_rows_per_s"), other.get("throughput_rows_per_s")
    if speedup is None or interval is None or rate is None or other_rate is None:
        return False
    return speedup.value >= interval[0] and rate.value >= slowest_rate(other_rate)


def _unusable(result: Result, policy: Policy) -> str:
    limited = [(spec.metric, spec.dataset) for _, spec, _ in _limits(result, policy)]
    return unusable_reason(result, policy, limited)


def _limits(result: Result, policy: Policy) -> Iterator[tuple[str, LimitSpec, float]]:
    """Limits of the policy that apply to a result: field, specification, value."""
    for field, spec in LIMITS.items():
        limit = getattr(policy, field)
        if limit is not None and not (spec.metric == "peak_device_mb" and result.device == CPU):
            yield field, spec, limit


def _violations(result: Result, policy: Policy) -> list[Violation]:
    found = []
    if result.variant != result.baseline and (violation := _quality_violation(result, policy)):
        found.append(violation)
    if policy.runtimes and result.runtime not in policy.runtimes:
        text = f"runtime {result.runtime} is not allowed (runtimes={','.join(policy.runtimes)})"
        found.append(Violation(text, 1.0))
    if not policy.allows_device(result.device):
        text = f"device {result.device} is not allowed (devices={','.join(policy.devices)})"
        found.append(Violation(text, 1.0))
    for field, (metric, dataset, title, unit), limit in _limits(result, policy):
        value = required_value(result, metric, dataset)
        upper = field.startswith("max_")
        if (value > limit) if upper else (value < limit):
            excess = value / limit - 1 if upper else 1 - value / limit
            side, measured_in = "over" if upper else "under", f" {unit}" if unit else ""
            text = f"{title} {value:.4g}{measured_in} is {side} {limit:g}{measured_in} ({field})"
            found.append(Violation(text, excess))
    return found


def _quality_violation(result: Result, policy: Policy) -> Violation | None:
    """The measured accuracy is too low, or more could be lost than 95 % confidence allows."""
    accuracy, reference = accuracies(result)
    minimum = policy.retain * reference
    if accuracy < minimum - 1e-9:  # tolerate rounding of the sum of two fractions
        text = (
            f"validation accuracy {accuracy:.4f} is under {minimum:.4f} (retain={policy.retain:g})"
        )
        return Violation(text, 1 - accuracy / minimum)
    kept = result.get("accuracy_kept", "validation")
    if not policy.retain_low or kept is None or kept.low is None or kept.low >= policy.retain_low:
        return None
    rows = len(result.predicted.get("validation", ())) or _row_count(result)
    needed = _rows_needed(kept.value, kept.low, rows, policy.retain_low)
    remedy = (
        f"about {needed:,} validation rows would decide, there are {rows:,}"
        if needed
        else "more validation rows would not help"
    )
    text = (
        f"it keeps {kept.value:.1%} of the baseline's validation accuracy, but with 95 % "
        f"confidence only {kept.low:.1%}, under {policy.retain_low:.0%} "
        f"(retain_low={policy.retain_low:g}); {remedy}"
    )
    return Violation(text, policy.retain_low - kept.low, needed)


def _row_count(result: Result) -> int:
    accuracy = result.get("accuracy", "validation")
    return len(accuracy.samples) if accuracy else 0


def _rows_needed(value: float, low: float, rows: int, minimum: float) -> int | None:
    """Rows at which the bound of the same value reaches the minimum: its distance ~ 1 / sqrt(n).

    Rounded up to two digits; None if no number of rows would do.
    """
    if value <= minimum or not rows:
        return None
    needed = rows * ((value - low) / (value - minimum)) ** 2
    if needed > _MAX_ROWS:
        return None
    step = 10 ** max(0, len(str(int(needed))) - 2)
    return int(-(-needed // step) * step)


def _undecided(
    results: Sequence[Result],
    chosen: Result,
    violations: Mapping[str, list[Violation]],
    policy: Policy,
) -> str:
    """Name the best variant that failed only because there are too few validation rows."""
    better = [
        each
        for each in results
        if (found := violations.get(each.variant))
        and all(violation.rows_needed for violation in found)
        and cost(each, policy) < cost(chosen, policy)
    ]
    if not better:
        return ""
    best = min(better, key=lambda each: cost(each, policy))
    return " " + explain_undecided(best, chosen, violations[best.variant][0], policy)


def _preference(result: Result) -> tuple[float, float, str]:
    accuracy, _ = accuracies(result)
    return -accuracy, required_value(result, "artifact_mb"), result.variant


def _considered(
    results: Sequence[Result],
    violations: Mapping[str, list[Violation]],
    tied: Sequence[Result],
    chosen: Result | None,
    policy: Policy,
) -> tuple[tuple[str, str], ...]:
    considered = []
    for each in results:
        if each is chosen:
            why = "chosen"
        elif each in tied:
            why = "kept: tied with the best, but not preferred"
        elif found := violations.get(each.variant):
            why = "excluded: " + "; ".join(violation.text for violation in found)
        else:
            why = _unusable(each, policy) or "kept: meets the limits, but another is better"
        considered.append((each.variant, why))
    return tuple(considered)
