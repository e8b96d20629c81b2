"""Explain a selection in one paragraph of plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlflow_pt_deploy.evaluation.result import Result
from mlflow_pt_deploy.selection.comparison import (
    accuracies,
    beats_baseline,
    overall_speedup,
    price_per_million_rows,
    required_value,
    speedup_interval,
)
from mlflow_pt_deploy.selection.policy import Policy
from mlflow_pt_deploy.system.device import CPU

_MAX_NEAREST = 3


@dataclass(frozen=True)
class Violation:
    """A limit that a variant does not meet.

    Attributes:
        text: Description with both numbers.
        excess: Distance to the limit as a fraction of it; used to rank near misses.
        rows_needed: Validation rows with which the limit would be met, if only they are missing.
    """

    text: str
    excess: float
    rows_needed: int | None = None


def explain_choice(
    chosen: Result,
    tied: Sequence[Result],
    allowed: Sequence[Result],
    policy: Policy,
) -> str:
    """Explain why a variant was chosen.

    Args:
        chosen: The chosen variant.
        tied: Variants within noise of the best one, including `chosen`.
        allowed: All variants that meet the limits.
        policy: Limits and objective.
    """
    others = ", ".join(each.variant for each in tied if each is not chosen)
    rank = "" if others else ", the best among the variants within the limits"
    devices = {each.device for each in allowed}
    where = f" on {device_title(chosen.device)}" if devices != {CPU} else ""
    sentences = [
        f"{chosen.variant} {_performance(chosen, policy)}{where}{rank}.",
        _comparison(chosen),
        *_quality(chosen, policy),
    ]
    if (rows := chosen.value("best_batch_rows")) is not None:
        sentences.append(
            f"It performs best with {_threads(chosen)} and batches of {rows:.0f} rows."
        )
    if others:
        sentences.append(
            f"No difference in {policy.objective} beyond noise to {others}: chosen for higher "
            "validation accuracy, then for smaller artifact."
        )
    if not any(beats_baseline(each, allowed, policy) for each in allowed):
        sentences.append(
            f"Nothing within the limits has a better {policy.objective} than the baseline beyond "
            "noise."
        )
    return " ".join(sentences)


def explain_no_choice(violations: Mapping[str, list[Violation]]) -> str:
    """Explain why no variant was chosen, and name the nearest ones.

    Args:
        violations: Violated limits of each measured variant.
    """
    if not violations:
        return "No variant was measured successfully, so there is nothing to choose from."
    nearest = sorted(violations, key=lambda name: max(each.excess for each in violations[name]))
    texts = [
        f"{name}: {' and '.join(each.text for each in violations[name])}"
        for name in nearest[:_MAX_NEAREST]
    ]
    return (
        f"None of the {len(violations)} measured variants is within the limits. Nearest: "
        f"{'; '.join(texts)}. Loosen a limit, or train a better student."
    )


def quality_warning(chosen: Result, results: Sequence[Result]) -> str:
    """Return the notes of the chosen variant and of its baseline as a warning, or nothing."""
    baseline = [each for each in results if each.variant == chosen.baseline != chosen.variant]
    notes = [f"{each.variant} {note}. " for each in [chosen, *baseline] for note in each.notes]
    return f"Warning: {''.join(notes)}" if notes else ""


def _quality(chosen: Result, policy: Policy) -> list[str]:
    """Both accuracies, and both fractions of the policy."""
    if chosen.variant == chosen.baseline:
        return []
    accuracy, reference = accuracies(chosen)
    kept = chosen.get("accuracy_kept", "validation")
    sentence = (
        f"Its validation accuracy is {accuracy:.4f}, that of the baseline {reference:.4f}; "
        f"the minimum is {policy.retain * reference:.4f} (retain={policy.retain:g})."
    )
    sentences = [sentence]
    if chosen.runtime == "cascade":
        sentences.append(
            "Its validation accuracy is cross-fitted: each half of the rows judges the threshold "
            "that was set on the other half."
        )
    if not policy.retain_low or kept is None or kept.low is None:
        return sentences
    return [
        *sentences,
        f"With 95 % confidence it keeps at least {kept.low:.1%} of the baseline's accuracy "
        f"(retain_low={policy.retain_low:g}).",
    ]


def explain_undecided(better: Result, chosen: Result, violation: Violation, policy: Policy) -> str:
    """Explain that a better variant was not chosen for want of validation rows.

    Args:
        better: The variant.
        chosen: The chosen variant.
        violation: Why it was not chosen, with the number of rows that would decide.
        policy: Limits and objective.
    """
    return f"{better.variant} {_performance(better, policy)} and is better, but {violation.text}."


def _performance(chosen: Result, policy: Policy) -> str:
    if policy.objective == "latency":
        return f"takes {required_value(chosen, 'latency_p50_ms'):.3g} ms per row (median)"
    if policy.objective == "size":
        return f"takes {required_value(chosen, 'artifact_mb'):.3g} MB"
    if policy.objective == "cost":
        price = price_per_million_rows(chosen, policy)
        return f"costs {price:.3g} per million rows"
    return f"processes {required_value(chosen, 'throughput_rows_per_s'):,.0f} rows/s"


def _threads(result: Result) -> str:
    return "one thread" if result.threads == 1 else f"{result.threads} threads"


def _comparison(chosen: Result) -> str:
    speedup, interval = overall_speedup(chosen), speedup_interval(chosen)
    if chosen.variant == chosen.baseline:
        return "It is the baseline itself."
    if speedup is None or interval is None:
        return "Its speedup over the baseline was not measured."
    low, high = interval
    local, where = "", ""
    if chosen.device != CPU and (same := chosen.value("speedup")) is not None:
        where = " on the CPU"
        local = f", and {same:.3g}x as fast as {chosen.timed_against} on the same device"
    over = f"{chosen.baseline or 'the baseline'}{where}"
    return (
        f"For single rows it is {speedup.value:.3g}x as fast as {over} "
        f"(95 % interval {low:.3g} to {high:.3g}){local}."
    )


def device_title(device: str) -> str:
    """A device in a sentence."""
    return "the CPU" if device == CPU else "the GPU"
