"""When to stop a trial early: if even a hopeful guess of where it ends is already beaten.

Optuna's pruners refuse studies of two objectives (optuna#3450), and compare accuracies alone, which
would stop every small student for being less accurate than the large ones. So here a trial is
compared only with those that are no slower.

The rule is predictive termination (Domhan, Springenberg & Hutter 2015) without its model of
learning curves: the guess is the accuracy now plus the largest gain that any finished trial of the
same kind still made from the same share of its epochs on. Shares compare trials of different length
because the learning rate falls linearly to the end of each.
"""

from __future__ import annotations

from collections.abc import Sequence

from mlflow_pt_deploy.search.pareto import CompletedTrial
from mlflow_pt_deploy.search.space import TrialParams

_LEAST_GAINS = 5  # as many as Optuna's MedianPruner waits for


def should_prune(
    point: TrialParams, curve: Sequence[tuple[int, float]], finished: Sequence[CompletedTrial]
) -> str:
    """Why a running trial should stop, or nothing.

    Args:
        point: What it tries.
        curve: Its epochs so far, and the validation accuracy after each.
        finished: The finished trials of the study.
    """
    share = curve[-1][0] / point.epochs
    if share >= 1:  # only measuring is left, and a measured trial teaches the search more
        return ""
    floor = _least_latency(point, finished)
    rivals = [trial for trial in finished if trial.outcome.latency_ms <= floor]
    gains = [g for t in finished if t.point.kind == point.kind and (g := _gain(t, share)) >= 0]
    if not rivals or len(gains) < _LEAST_GAINS:
        return ""
    best = max(rivals, key=lambda trial: trial.outcome.accuracy)
    now = max(accuracy for _, accuracy in curve)
    hope = now + max(gains)
    if hope >= best.outcome.accuracy:
        return ""
    return (
        f"{now:.4f} after epoch {curve[-1][0]} of {point.epochs}: no trial gained more than "
        f"{max(gains):.4f} from there, and trial {best.number} has {best.outcome.accuracy:.4f} and "
        "is no slower"
    )


def _least_latency(point: TrialParams, finished: Sequence[CompletedTrial]) -> float:
    """A lower bound of a point's latency, known before it is trained; 0 if nothing is known.

    Latency depends on the shape alone: a student is no faster than another of its kind that is no
    larger in any way, on the same variant and threads. Of measurements of one shape the smallest
    counts: noise only adds.
    """
    least: dict[tuple[float, ...], float] = {}
    for trial in finished:
        shape, latency = _shape(trial.point), trial.outcome.latency_ms
        no_larger = all(a <= b for a, b in zip(shape, _shape(point), strict=True))
        if _runs_on(trial.point) == _runs_on(point) and no_larger:
            least[shape] = min(latency, least.get(shape, latency))
    return max(least.values(), default=0.0)


def _shape(point: TrialParams) -> tuple[float, ...]:
    return point.layers, point.heads or float("inf"), point.width


def _runs_on(point: TrialParams) -> tuple[str, str, int]:
    return point.kind, point.variant, point.threads


def _gain(trial: CompletedTrial, share: float) -> float:
    """What a finished trial gained after a share of its epochs; -1 if it did not report by then.

    Its last report before is taken, which makes the gain rather too large.
    """
    before = [a for step, a in trial.curve if step / trial.point.epochs <= share]
    return max(0.0, trial.outcome.accuracy - max(before)) if before else -1.0
