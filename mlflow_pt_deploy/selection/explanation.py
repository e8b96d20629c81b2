"""Explain a selection in one paragraph of plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlflow_pt_deploy.evaluation.result import Result
from mlflow_pt_deploy.selection.comparison import (
    Objective,
    accuracies,
    beats_baseline,
    required_value,
    speedup_interval,
)

_MAX_NEAREST = 3


@dataclass(frozen=True)
class Violation:
    """A limit that a variant does not meet.

    Attributes:
        text: Description with both numbers.
        excess: Distance to the limit as a fraction of it; used to rank near misses.
    """

    text: str
    excess: float


def explain_choice(
    chosen: Result,
    tied: Sequence[Result],
    allowed: Sequence[Result],
    retain: float,
    objective: Objective,
) -> str:
    """Explain why a variant was chosen.

    Args:
        chosen: The chosen variant.
        tied: Variants within noise of the best one, including `chosen`.
        allowed: All variants that meet the limits.
        retain: Minimum fraction of the baseline's accuracy.
        objective: What was optimized.
    """
    accuracy, reference = accuracies(chosen)
    others = ", ".join(each.variant for each in tied if each is not chosen)
    rank = "" if others else ", the best among the variants within the limits"
    sentences = [
        f"{chosen.variant} {_performance(chosen, objective)}{rank}.",
        _comparison(chosen),
        f"Its validation accuracy is {accuracy:.4f}, that of the baseline {reference:.4f}; "
        f"the minimum is {retain * reference:.4f} (retain={retain:g}).",
    ]
    if (rows := chosen.value("best_batch_rows")) is not None:
        sentences.append(
            f"It performs best with {_threads(chosen)} and batches of {rows:.0f} rows."
        )
    if others:
        sentences.append(
            f"No difference in {objective} beyond noise to {others}: chosen for higher validation "
            "accuracy, then for smaller artifact."
        )
    if not any(beats_baseline(each, allowed, objective) for each in allowed):
        sentences.append("Nothing within the limits is faster than the baseline beyond noise.")
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


def _performance(chosen: Result, objective: Objective) -> str:
    if objective == "latency":
        return f"takes {required_value(chosen, 'latency_p50_ms'):.3g} ms per row (median)"
    return f"processes {required_value(chosen, 'throughput_rows_per_s'):,.0f} rows/s"


def _threads(result: Result) -> str:
    return "one thread" if result.threads == 1 else f"{result.threads} threads"


def _comparison(chosen: Result) -> str:
    speedup, interval = chosen.get("speedup"), speedup_interval(chosen)
    if chosen.variant == chosen.baseline:
        return "It is the baseline itself."
    if speedup is None or interval is None:
        return "Its speedup over the baseline was not measured."
    low, high = interval
    return (
        f"For single rows it is {speedup.value:.3g}x as fast as "
        f"{chosen.baseline or 'the baseline'} (95 % interval {low:.3g} to {high:.3g})."
    )
