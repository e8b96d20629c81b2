"""Select pairs of variants for a cascade, and the confidence threshold of the fast one.

The threshold is set on validation rows, never on test rows, and judged by cross-fitting
(Chernozhukov et al., "Double/debiased machine learning", 2018): each half of the rows judges the
threshold that was set on the other half. A threshold judged on its own rows promises too much.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt

from mlflow_pt_deploy.evaluation.result import Result, find_baseline
from mlflow_pt_deploy.evaluation.statistics import mcnemar_p, paired_drop, paired_ratio
from mlflow_pt_deploy.selection.policy import Policy
from mlflow_pt_deploy.system.device import CPU

# Accuracy above the limit that a threshold has to reach on the rows that it is set on.
_MARGIN = 0.002
_MAX_PLANS = 2

_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class CascadePlan:
    """A cascade within the accuracy limits on validation.

    Attributes:
        fast, strong: Names of the variants.
        threshold: Confidence of `fast` below which `strong` predicts: the higher one of the two
            halves.
        deferral: Fraction of the validation rows that go to `strong`.
        correct: 1 for each validation row that is correct with the threshold of the half that it
            does not belong to, else 0.
        cost: Expected time of one row relative to the baseline.
    """

    fast: str
    strong: str
    threshold: float
    deferral: float
    correct: tuple[float, ...]
    cost: float

    @property
    def accuracy(self) -> float:
        """Cross-fitted validation accuracy."""
        return sum(self.correct) / len(self.correct)


def plan_cascades(results: Sequence[Result], policy: Policy) -> list[CascadePlan]:
    """Plan cascades that are faster than every single variant within the limits, fastest first.

    For each pair of models, the fastest variant of one is combined with every variant of the
    other. All of them run on the CPU.

    Args:
        results: From `measure`, with samples of accuracy and confidence on validation, the
            baseline among them.
        policy: `retain` and `retain_low` are required of the cross-fitted accuracy.
    """
    usable = [
        each
        for each in results
        if not each.reason and each.device == CPU and _cost(each) is not None
    ]
    baseline = find_baseline(usable)
    if baseline is None:
        return []
    reference = _correct(baseline)
    best_single = min(
        _cost(each) or 0.0 for each in usable if _keeps(reference, _correct(each), policy)
    )
    plans = [
        plan
        for fast, others in _pairs(usable)
        if not _keeps(reference, _correct(fast), policy)
        for plan in _best(fast, others, reference, policy)
        if plan.cost < best_single
    ]
    return sorted(plans, key=lambda plan: plan.cost)[:_MAX_PLANS]


def cross_fitted(result: Result, plan: CascadePlan, baseline: Result) -> Result:
    """Replace the validation accuracy of a measured cascade by the cross-fitted one.

    Args:
        result: Measured with the threshold of the plan, on the rows that it was set on.
        plan: The plan of the cascade.
        baseline: Result of the baseline.
    """
    if result.reason:
        return result
    correct, reference = np.array(plan.correct) > 0, _correct(baseline) > 0
    drop, kept = paired_drop(reference, correct), paired_ratio(reference, correct)
    judged: dict[str, dict[str, Any]] = {
        "accuracy": {"value": plan.accuracy, "samples": plan.correct},
        "accuracy_drop": drop._asdict(),
        "accuracy_kept": {"value": kept[0], "low": kept[1]},
        "mcnemar_p": {"value": mcnemar_p(reference, correct)},
    }
    measurements = tuple(
        replace(each, **judged[each.name])
        if each.dataset == "validation" and each.name in judged
        else each
        for each in result.measurements
    )
    return replace(result, measurements=measurements)


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


def _best(
    fast: Result, others: Sequence[Result], reference: _Floats, policy: Policy
) -> list[CascadePlan]:
    """The cheapest plan with the fast variant, in a list; empty if none keeps the accuracy."""
    plans = [plan for strong in others if (plan := _plan(fast, strong, reference, policy))]
    return sorted(plans, key=lambda plan: plan.cost)[:1]


def _plan(fast: Result, strong: Result, reference: _Floats, policy: Policy) -> CascadePlan | None:
    """Set a threshold on each half and judge it on the other; None if too much is lost."""
    confidence, first, second = _samples(fast, "confidence"), _correct(fast), _correct(strong)
    half = np.random.default_rng(0).permutation(len(confidence)) % 2 == 0
    thresholds = []
    correct = np.zeros(len(confidence))
    for rows, judged in ((half, ~half), (~half, half)):
        minimum = policy.retain * reference[rows].mean() + _MARGIN
        threshold = _threshold(confidence[rows], first[rows], second[rows], minimum)
        if threshold is None:
            return None
        thresholds.append(threshold)
        unsure = confidence[judged] < threshold
        correct[judged] = np.where(unsure, second[judged], first[judged])
    if not _keeps(reference, correct, policy):
        return None
    threshold = max(thresholds)
    deferral = float((confidence < threshold).mean())
    if not 0 < deferral < 1:
        return None
    cost = (_cost(fast) or 0.0) + deferral * (_cost(strong) or 0.0)
    return CascadePlan(
        fast.variant, strong.variant, threshold, deferral, tuple(correct.tolist()), cost
    )


def _threshold(confidence: _Floats, fast: _Floats, strong: _Floats, minimum: float) -> float | None:
    """The lowest threshold with which these rows reach an accuracy; None if none does.

    Rows with equal confidence cannot be separated; deferring all rows is not a cascade.
    """
    if fast.mean() >= minimum:
        return 0.0
    order = np.argsort(confidence, kind="stable")
    gained = np.cumsum((strong - fast)[order])
    accurate = (fast.sum() + gained) / len(confidence) >= minimum
    candidates = np.flatnonzero(accurate[:-1] & (np.diff(confidence[order]) > 0))
    if not len(candidates):
        return None
    last = int(candidates[0])
    return float(confidence[order[last]] + confidence[order[last + 1]]) / 2


def _keeps(reference: _Floats, correct: _Floats, policy: Policy) -> bool:
    """Whether the accuracy meets `retain` and `retain_low`; the reference's own always does."""
    if (reference == correct).all():
        return True
    if correct.mean() < policy.retain * reference.mean():
        return False
    return paired_ratio(reference > 0, correct > 0)[1] >= policy.retain_low


def _cost(result: Result) -> float | None:
    """Return the interleaved time of one row relative to the baseline."""
    speedup = result.value("speedup")
    return 1 / speedup if speedup else None


def _correct(result: Result) -> _Floats:
    return _samples(result, "accuracy")


def _samples(result: Result, name: str) -> _Floats:
    found = result.get(name, "validation")
    return np.asarray(found.samples if found is not None else (), dtype=np.float64)
