"""Select a variant by the user's limits and objective, and explain the selection.

Uses validation measurements only. Test rows never influence the selection, so that the test
accuracy of the selected variant is unbiased.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlflow_pt_deploy.errors import PolicyError
from mlflow_pt_deploy.evaluation.result import Result
from mlflow_pt_deploy.selection.comparison import (
    Objective,
    accuracies,
    cost,
    is_tied,
    required_value,
    slowest_rate,
    speedup_interval,
    unusable_reason,
)
from mlflow_pt_deploy.selection.explanation import (
    Violation,
    explain_choice,
    explain_no_choice,
    quality_warning,
)

_CAPS = {
    "max_latency_p95_ms": ("latency_p95_ms", "p95 latency", "ms"),
    "max_artifact_mb": ("artifact_mb", "artifact size", "MB"),
    "max_peak_rss_mb": ("peak_rss_mb", "peak memory", "MB"),
}


@dataclass(frozen=True)
class Policy:
    """Limits that a variant must meet, and the objective to optimize.

    Attributes:
        retain: Minimum validation accuracy as a fraction of the baseline's, 0 to 1; 0.99 of a
            baseline with 0.900 requires 0.891.
        max_latency_p95_ms: Maximum 95th percentile of the latency of one row.
        max_artifact_mb: Maximum size of the folder, in 10^6 bytes.
        max_peak_rss_mb: Maximum peak resident memory, in 10^6 bytes.
        objective: ``latency`` (largest speedup, one row at a time) or ``throughput`` (most rows/s).

    Raises:
        PolicyError: A field is invalid; the message names it.
    """

    retain: float = 0.99
    max_latency_p95_ms: float | None = None
    max_artifact_mb: float | None = None
    max_peak_rss_mb: float | None = None
    objective: Objective = "latency"

    def __post_init__(self) -> None:
        if not (_is_number(self.retain) and 0 <= self.retain <= 1):
            raise PolicyError(
                f"retain is {self.retain!r}; give the fraction of the baseline's accuracy to keep "
                "as a number from 0 to 1, e.g. 0.99."
            )
        for field in _CAPS:
            limit = getattr(self, field)
            if limit is not None and not (_is_number(limit) and limit > 0):
                raise PolicyError(
                    f"{field} is {limit!r}; give a number above 0, or leave it out for no limit."
                )
        if self.objective not in ("latency", "throughput"):
            raise PolicyError(f"objective is {self.objective!r}; give 'latency' or 'throughput'.")


@dataclass(frozen=True)
class Choice:
    """The selected variant and the reason.

    Attributes:
        variant: Name of the variant, or None if no variant meets the limits.
        reason: Explanation in one paragraph.
        considered: Each variant with why it was kept or excluded, in the order of the results.
    """

    variant: str | None
    reason: str
    considered: tuple[tuple[str, str], ...]


def choose(results: Sequence[Result], policy: Policy) -> Choice:
    """Select the best variant that meets the limits.

    For ``latency``, a variant whose speedup lies within the interval of the fastest is tied with
    it. Ties are resolved by higher validation accuracy, then by smaller artifact, then by name.

    Args:
        results: From `measure`; failed results are skipped.
        policy: Limits and objective.
    """
    violations = {
        each.variant: _violations(each, policy) for each in results if not _unusable(each)
    }
    allowed = [each for each in results if violations.get(each.variant) == []]
    if not allowed:
        reason = explain_no_choice(violations)
        return Choice(None, reason, _considered(results, violations, [], None))
    best = min(allowed, key=lambda each: cost(each, policy.objective))
    tied = [each for each in allowed if each is best or is_tied(each, best, policy.objective)]
    chosen = min(tied, key=_preference)
    reason = explain_choice(chosen, tied, allowed, policy.retain, policy.objective)
    return Choice(
        chosen.variant,
        quality_warning(chosen, results) + reason,
        _considered(results, violations, tied, chosen),
    )


def finalists(results: Sequence[Result], policy: Policy, count: int = 2) -> list[str]:
    """Return the names of the best variants that meet the limits, best first."""
    usable = [each for each in results if not _unusable(each) and not _violations(each, policy)]
    best = sorted(usable, key=lambda each: cost(each, policy.objective))
    return [each.variant for each in best[:count]]


def not_slower_than(one: Result, other: Result) -> bool:
    """Whether `one` is not slower than `other` beyond noise, for single rows and in batches."""
    speedup, interval = one.value("speedup"), speedup_interval(other)
    rate, other_rate = one.get("throughput_rows_per_s"), other.get("throughput_rows_per_s")
    if speedup is None or interval is None or rate is None or other_rate is None:
        return False
    return speedup >= interval[0] and rate.value >= slowest_rate(other_rate)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _unusable(result: Result) -> str:
    return unusable_reason(result, [metric for metric, *_ in _CAPS.values()])


def _violations(result: Result, policy: Policy) -> list[Violation]:
    found = []
    accuracy, reference = accuracies(result)
    minimum = policy.retain * reference
    if accuracy < minimum - 1e-9:  # tolerate rounding of the sum of two fractions
        text = (
            f"validation accuracy {accuracy:.4f} is under {minimum:.4f} (retain={policy.retain:g})"
        )
        found.append(Violation(text, 1 - accuracy / minimum))
    for field, (metric, title, unit) in _CAPS.items():
        limit, value = getattr(policy, field), required_value(result, metric)
        if limit is not None and value > limit:
            text = f"{title} {value:.4g} {unit} is over {limit:g} {unit} ({field})"
            found.append(Violation(text, value / limit - 1))
    return found


def _preference(result: Result) -> tuple[float, float, str]:
    accuracy, _ = accuracies(result)
    return -accuracy, required_value(result, "artifact_mb"), result.variant


def _considered(
    results: Sequence[Result],
    violations: Mapping[str, list[Violation]],
    tied: Sequence[Result],
    chosen: Result | None,
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
            why = _unusable(each) or "kept: meets the limits, but another is better"
        considered.append((each.variant, why))
    return tuple(considered)
