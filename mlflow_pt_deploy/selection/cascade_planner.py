"""Which two variants make a good cascade, and how sure the fast one must be. Pure.

The threshold is set on validation for the user's accuracy limit, never on test.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt

from mlflow_pt_deploy.evaluation.result import Result

# Above the limit by this much: what a threshold gains by luck on validation must not be all of it.
_MARGIN = 0.002
_MOST = 2


@dataclass(frozen=True)
class CascadePlan:
    """A cascade that keeps to the accuracy limit on validation.

    Attributes:
        fast, strong: Names of the variants.
        threshold: Confidence of `fast` below which `strong` answers.
        deferral: Share of validation rows that go to `strong`.
        accuracy: On validation.
        cost: Expected time of one row as a share of the baseline's.
    """

    fast: str
    strong: str
    threshold: float
    deferral: float
    accuracy: float
    cost: float


def plan_cascades(results: Sequence[Result], retain: float) -> list[CascadePlan]:
    """Cascades that are faster than every single variant within the limit, the fastest first.

    For each pair of models the fastest variant of one is tried before every variant of the other.

    Args:
        results: From `measure`, with the answers to each validation row as evidence.
        retain: Least share of the baseline's validation accuracy to keep, 0 to 1.
    """
    usable = [each for each in results if not each.reason and _cost(each) is not None]
    if not usable:
        return []
    least = retain * _baseline_accuracy(usable)
    alone = min((_cost(r) or 0.0 for r in usable if _right(r).mean() >= least), default=np.inf)
    plans = [
        plan
        for fast, others in _pairs(usable)
        for plan in _best(fast, others, least + _MARGIN)
        if plan.cost < alone
    ]
    return sorted(plans, key=lambda plan: plan.cost)[:_MOST]


def _pairs(results: Sequence[Result]) -> Iterator[tuple[Result, list[Result]]]:
    """The fastest variant of each model, with all variants of one other model."""
    by_model = {
        model: list(group)
        for model, group in groupby(sorted(results, key=lambda r: r.model), lambda r: r.model)
    }
    for first, group in by_model.items():
        fastest = min(group, key=lambda r: _cost(r) or 0.0)
        for second, others in by_model.items():
            if second != first:
                yield fastest, others


def _best(fast: Result, others: Sequence[Result], least: float) -> list[CascadePlan]:
    plans = [plan for strong in others if (plan := _plan(fast, strong, least)) is not None]
    return sorted(plans, key=lambda plan: plan.cost)[:1]


def _plan(fast: Result, strong: Result, least: float) -> CascadePlan | None:
    """The smallest deferral that reaches the accuracy, or None where none or all would go."""
    sure = _evidence(fast, "confidence")
    order = np.argsort(sure, kind="stable")
    gained = np.cumsum((_right(strong) - _right(fast))[order])
    rows = len(sure)
    accurate = (_right(fast).sum() + gained) / rows >= least
    # Rows of like confidence go together; and if all rows go, there is no cascade.
    reached = np.flatnonzero(accurate[:-1] & (np.diff(sure[order]) > 0))
    if not len(reached) or _right(fast).mean() >= least:
        return None
    deferred = int(reached[0]) + 1
    threshold = float(sure[order[deferred - 1]] + sure[order[deferred]]) / 2
    share = float((sure < threshold).mean())
    cost = (_cost(fast) or 0.0) + share * (_cost(strong) or 0.0)
    accuracy = float((_right(fast).sum() + gained[deferred - 1]) / rows)
    return CascadePlan(fast.variant, strong.variant, threshold, share, accuracy, cost)


def _baseline_accuracy(results: Sequence[Result]) -> float:
    one = results[0]
    return (one.value("accuracy", "validation") or 0.0) + (
        one.value("accuracy_drop", "validation") or 0.0
    )


def _cost(result: Result) -> float | None:
    """Time of one row as a share of the baseline's, timed in turns with it."""
    speedup = result.value("speedup")
    return 1 / speedup if speedup else None


def _right(result: Result) -> npt.NDArray[np.float64]:
    return _evidence(result, "accuracy")


def _evidence(result: Result, name: str) -> npt.NDArray[np.float64]:
    found = result.get(name, "validation")
    return np.asarray(found.samples if found is not None else (), dtype=np.float64)
