"""Select pairs of variants for a cascade, and the confidence threshold of the fast one.

The threshold is tuned on the validation rows for the accuracy limit, never on the test rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt

from mlflow_pt_deploy.evaluation.result import Result

# Required accuracy above the limit, because a threshold tuned on validation is optimistic there.
_MARGIN = 0.002
_MAX_PLANS = 2


@dataclass(frozen=True)
class CascadePlan:
    """A cascade within the accuracy limit on validation.

    Attributes:
        fast, strong: Names of the variants.
        threshold: Confidence of `fast` below which `strong` predicts.
        deferral: Fraction of the validation rows that go to `strong`.
        accuracy: Validation accuracy.
        cost: Expected time of one row relative to the baseline.
    """

    fast: str
    strong: str
    threshold: float
    deferral: float
    accuracy: float
    cost: float


def plan_cascades(results: Sequence[Result], retain: float) -> list[CascadePlan]:
    """Plan cascades that are faster than every single variant within the limit, fastest first.

    For each pair of models, the fastest variant of one is combined with every variant of the
    other.

    Args:
        results: From `measure`, with samples of accuracy and confidence on validation.
        retain: Minimum validation accuracy as a fraction of the baseline's, 0 to 1.
    """
    usable = [each for each in results if not each.reason and _cost(each) is not None]
    if not usable:
        return []
    min_accuracy = retain * _baseline_accuracy(usable)
    best_single = min(
        (_cost(each) or 0.0 for each in usable if _correct(each).mean() >= min_accuracy),
        default=np.inf,
    )
    plans = [
        plan
        for fast, others in _pairs(usable)
        for plan in _best(fast, others, min_accuracy + _MARGIN)
        if plan.cost < best_single
    ]
    return sorted(plans, key=lambda plan: plan.cost)[:_MAX_PLANS]


def _pairs(results: Sequence[Result]) -> Iterator[tuple[Result, list[Result]]]:
    """Yield the fastest variant of each model with all variants of one other model."""
    by_model = {
        model: list(group)
        for model, group in groupby(sorted(results, key=lambda r: r.model), lambda r: r.model)
    }
    for first, group in by_model.items():
        fastest = min(group, key=lambda r: _cost(r) or 0.0)
        for second, others in by_model.items():
            if second != first:
                yield fastest, others


def _best(fast: Result, others: Sequence[Result], min_accuracy: float) -> list[CascadePlan]:
    plans = [plan for strong in others if (plan := _plan(fast, strong, min_accuracy)) is not None]
    return sorted(plans, key=lambda plan: plan.cost)[:1]


def _plan(fast: Result, strong: Result, min_accuracy: float) -> CascadePlan | None:
    """Find the smallest deferral that reaches the accuracy; None if it would be no or all rows."""
    confidence = _samples(fast, "confidence")
    order = np.argsort(confidence, kind="stable")
    gained = np.cumsum((_correct(strong) - _correct(fast))[order])
    rows = len(confidence)
    accurate = (_correct(fast).sum() + gained) / rows >= min_accuracy
    # Rows with equal confidence cannot be separated; deferring all rows is not a cascade.
    candidates = np.flatnonzero(accurate[:-1] & (np.diff(confidence[order]) > 0))
    if not len(candidates) or _correct(fast).mean() >= min_accuracy:
        return None
    deferred = int(candidates[0]) + 1
    threshold = float(confidence[order[deferred - 1]] + confidence[order[deferred]]) / 2
    deferral = float((confidence < threshold).mean())
    cost = (_cost(fast) or 0.0) + deferral * (_cost(strong) or 0.0)
    accuracy = float((_correct(fast).sum() + gained[deferred - 1]) / rows)
    return CascadePlan(fast.variant, strong.variant, threshold, deferral, accuracy, cost)


def _baseline_accuracy(results: Sequence[Result]) -> float:
    first = results[0]  # the sum is the same for each result
    return (first.value("accuracy", "validation") or 0.0) + (
        first.value("accuracy_drop", "validation") or 0.0
    )


def _cost(result: Result) -> float | None:
    """Return the interleaved time of one row relative to the baseline."""
    speedup = result.value("speedup")
    return 1 / speedup if speedup else None


def _correct(result: Result) -> npt.NDArray[np.float64]:
    return _samples(result, "accuracy")


def _samples(result: Result, name: str) -> npt.NDArray[np.float64]:
    found = result.get(name, "validation")
    return np.asarray(found.samples if found is not None else (), dtype=np.float64)
