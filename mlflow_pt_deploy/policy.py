"""The user's limits and objective, and the variant that they select, with the reason in words.

Pure: reads results and touches nothing. Never looks at ``test``: what is chosen by its test
numbers has no honest test number left. Knows no runtime and no MLflow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mlflow_pt_deploy.errors import PolicyError
from mlflow_pt_deploy.measure.result import Measurement, Result

_NEAREST = 3
_CAPS = {
    "max_latency_p95_ms": ("latency_p95_ms", "p95 latency", "ms"),
    "max_artifact_mb": ("artifact_mb", "artifact size", "MB"),
    "max_peak_rss_mb": ("peak_rss_mb", "peak memory", "MB"),
}


@dataclass(frozen=True)
class Policy:
    """What a variant must keep to, and what makes one better than another.

    Attributes:
        retain: Least share of the baseline's validation accuracy to keep, 0 to 1; relative, so
            0.99 of a baseline at 0.900 asks for 0.891.
        max_latency_p95_ms: Longest 95th percentile of the time of one row.
        max_artifact_mb: Largest folder, in 10^6 bytes.
        max_peak_rss_mb: Largest resident memory, in 10^6 bytes.
        objective: ``latency`` (largest speedup, one row at a time) or ``throughput`` (most rows/s).

    Raises:
        PolicyError: A field makes no sense; the message names it.
    """

    retain: float = 0.99
    max_latency_p95_ms: float | None = None
    max_artifact_mb: float | None = None
    max_peak_rss_mb: float | None = None
    objective: Literal["latency", "throughput"] = "latency"

    def __post_init__(self) -> None:
        if not (_is_number(self.retain) and 0 <= self.retain <= 1):
            raise PolicyError(
                f"retain is {self.retain!r}; give the share of the baseline's accuracy to keep "
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
    """What was chosen, and why.

    Attributes:
        variant: Its name, or None where nothing meets the limits.
        reason: One paragraph for a person who was not there.
        considered: Each variant with why it was kept or excluded, in the order of the results.
    """

    variant: str | None
    reason: str
    considered: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class _Miss:
    """A limit that a variant does not meet.

    Attributes:
        text: In words, with both numbers.
        excess: How far off, as a share of the limit; ranks near misses.
    """

    text: str
    excess: float


def choose(results: Sequence[Result], policy: Policy) -> Choice:
    """Select the best variant that keeps to the limits.

    For ``latency``, every variant whose speedup lies within the interval of the fastest is tied
    with it. Ties go to the higher validation accuracy, then to the smaller artifact, then to
    the name.

    Args:
        results: From `measure`; failed ones are passed over.
        policy: Limits and objective.
    """
    misses = {each.variant: _misses(each, policy) for each in results if not _unusable(each)}
    allowed = [each for each in results if misses.get(each.variant) == []]
    if not allowed:
        return Choice(None, _nothing(misses), _considered(results, misses, [], None))
    best = min(allowed, key=lambda each: _cost(each, policy))
    tied = [each for each in allowed if each is best or _tie(each, best, policy)]
    chosen = min(tied, key=_preference)
    reason = _warning(chosen, results) + _reason(chosen, tied, allowed, policy)
    return Choice(chosen.variant, reason, _considered(results, misses, tied, chosen))


def finalists(results: Sequence[Result], policy: Policy, count: int = 2) -> list[str]:
    """Names of the best variants that keep to the limits, the best first."""
    usable = [each for each in results if not _unusable(each) and not _misses(each, policy)]
    best = sorted(usable, key=lambda each: _cost(each, policy))
    return [each.variant for each in best[:count]]


def no_slower(one: Result, other: Result) -> bool:
    """Whether `one` is beyond noise not slower than `other`, one row at a time and in batches."""
    speedup, interval = one.value("speedup"), _interval(other)
    rate, theirs = one.get("throughput_rows_per_s"), other.get("throughput_rows_per_s")
    if speedup is None or interval is None or rate is None or theirs is None:
        return False
    return speedup >= interval[0] and rate.value >= _slowest(theirs)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _unusable(result: Result) -> str:
    """Why the result cannot take part, or nothing."""
    if result.reason:
        return f"failed: {result.reason}"
    needed = ["latency_p50_ms", "throughput_rows_per_s", *(metric for metric, *_ in _CAPS.values())]
    missing = [name for name in needed if result.get(name) is None]
    missing += [n for n in ("accuracy", "accuracy_drop") if result.get(n, "validation") is None]
    return f"not measured: {', '.join(missing)}" if missing else ""


def _number(result: Result, name: str, dataset: str = "") -> float:
    value = result.value(name, dataset)
    assert value is not None, name  # `_unusable` has sorted those out
    return value


def _accuracies(result: Result) -> tuple[float, float]:
    """Validation accuracy of the variant and of its baseline."""
    accuracy = _number(result, "accuracy", "validation")
    return accuracy, accuracy + _number(result, "accuracy_drop", "validation")


def _misses(result: Result, policy: Policy) -> list[_Miss]:
    found = []
    accuracy, reference = _accuracies(result)
    least = policy.retain * reference
    if accuracy < least - 1e-9:  # a sum of two shares: equal up to rounding is equal
        text = f"validation accuracy {accuracy:.4f} is under {least:.4f} (retain={policy.retain:g})"
        found.append(_Miss(text, 1 - accuracy / least))
    for field, (metric, words, unit) in _CAPS.items():
        limit, value = getattr(policy, field), _number(result, metric)
        if limit is not None and value > limit:
            text = f"{words} {value:.4g} {unit} is over {limit:g} {unit} ({field})"
            found.append(_Miss(text, value / limit - 1))
    return found


def _cost(result: Result, policy: Policy) -> float:
    if policy.objective == "latency":
        # Not the median: a cascade's says nothing of the rows that it defers; and medians of
        # different minutes of a noisy machine do not compare, while speedups do.
        speedup = result.value("speedup")
        return 1 / speedup if speedup else math.inf
    return -_number(result, "throughput_rows_per_s")


def _preference(result: Result) -> tuple[float, float, str]:
    accuracy, _ = _accuracies(result)
    return -accuracy, _number(result, "artifact_mb"), result.variant


def _tie(one: Result, best: Result, policy: Policy) -> bool:
    if policy.objective == "throughput":
        return _cost(one, policy) == _cost(best, policy)
    interval, speedup = _interval(best), one.value("speedup")
    # The best one's interval alone: a noisy variant must not tie by the width of its own.
    return interval is not None and speedup is not None and interval[0] <= speedup


def _interval(result: Result) -> tuple[float, float] | None:
    speedup = result.get("speedup")
    if speedup is None or speedup.low is None or speedup.high is None:
        return None
    return speedup.low, speedup.high


def _reason(
    chosen: Result, tied: Sequence[Result], allowed: Sequence[Result], policy: Policy
) -> str:
    accuracy, reference = _accuracies(chosen)
    if policy.objective == "latency":
        goal = f"answers a row in {_number(chosen, 'latency_p50_ms'):.3g} ms (median)"
    else:
        goal = f"answers {_number(chosen, 'throughput_rows_per_s'):,.0f} rows/s"
    others = ", ".join(each.variant for each in tied if each is not chosen)
    rank = "" if others else ", the best among the variants that keep to the limits"
    sentences = [
        f"{chosen.variant} {goal}{rank}.",
        _compared(chosen),
        f"Its validation accuracy is {accuracy:.4f} where the baseline has {reference:.4f}; "
        f"at least {policy.retain * reference:.4f} was asked for (retain={policy.retain:g}).",
    ]
    if (rows := chosen.value("best_batch_rows")) is not None:
        sentences.append(f"It does best with {_threads(chosen)} and batches of {rows:.0f} rows.")
    if others:
        sentences.append(
            f"No difference in {policy.objective} beyond noise to {others}: chosen "
            "among them for the higher validation accuracy, then the smaller artifact."
        )
    if not any(_beats_baseline(each, allowed, policy) for each in allowed):
        sentences.append("Nothing within the limits is faster than the baseline beyond noise.")
    return " ".join(sentences)


def _warning(chosen: Result, results: Sequence[Result]) -> str:
    """What is wrong with the chosen variant, or with the baseline that it is held to."""
    baseline = [each for each in results if each.variant == chosen.baseline != chosen.variant]
    noted = [f"{each.variant} {note}. " for each in [chosen, *baseline] for note in each.notes]
    return f"Warning: {''.join(noted)}" if noted else ""


def _threads(result: Result) -> str:
    return "one thread" if result.threads == 1 else f"{result.threads} threads"


def _compared(chosen: Result) -> str:
    speedup, interval = chosen.get("speedup"), _interval(chosen)
    if chosen.variant == chosen.baseline:
        return "It is the baseline itself."
    if speedup is None or interval is None:
        return "Its speedup over the baseline was not measured."
    low, high = interval
    return (
        f"One row at a time it is {speedup.value:.3g}x as fast as "
        f"{chosen.baseline or 'the baseline'} (95 % interval {low:.3g} to {high:.3g})."
    )


def _beats_baseline(result: Result, allowed: Sequence[Result], policy: Policy) -> bool:
    """Whether the result is better than the baseline by more than its noise."""
    if result.variant == result.baseline:
        return False
    if policy.objective == "latency":
        interval = _interval(result)
        return interval is not None and interval[0] > 1
    rate = result.get("throughput_rows_per_s")
    theirs = [
        each.get("throughput_rows_per_s") for each in allowed if each.variant == each.baseline
    ]
    return rate is not None and all(
        _slowest(rate) > _fastest(other) for other in theirs if other is not None
    )


def _slowest(rate: Measurement) -> float:
    return min(rate.samples, default=rate.value)


def _fastest(rate: Measurement) -> float:
    return max(rate.samples, default=rate.value)


def _nothing(misses: dict[str, list[_Miss]]) -> str:
    if not misses:
        return "No variant was measured successfully, so there is nothing to choose from."
    nearest = sorted(misses, key=lambda name: max(miss.excess for miss in misses[name]))
    near = [f"{n}: {' and '.join(m.text for m in misses[n])}" for n in nearest[:_NEAREST]]
    return (
        f"None of the {len(misses)} measured variants keeps to the limits. Nearest: "
        f"{'; '.join(near)}. Loosen a limit, or train a better student."
    )


def _considered(
    results: Sequence[Result],
    misses: dict[str, list[_Miss]],
    tied: Sequence[Result],
    chosen: Result | None,
) -> tuple[tuple[str, str], ...]:
    words = []
    for each in results:
        if each is chosen:
            why = "chosen"
        elif each in tied:
            why = "kept: tied with the best, but not preferred"
        elif missed := misses.get(each.variant):
            why = "excluded: " + "; ".join(miss.text for miss in missed)
        else:
            why = _unusable(each) or "kept: meets the limits, but another is better"
        words.append((each.variant, why))
    return tuple(words)
