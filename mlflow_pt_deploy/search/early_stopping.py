"""Early stopping: stop trials that cannot reach the accuracy of a trial that is no slower.

Optuna's pruners do not support studies with two objectives (optuna#3450) and compare accuracies
only, which would stop every small student because large ones are more accurate. Here a trial is
compared only with trials that are no slower.

The rule is predictive termination (Domhan, Springenberg & Hutter 2015) without a model of learning
curves. The optimistic estimate is the current accuracy plus the largest gain that any finished
trial of the same kind made after the same share of its epochs. Shares make trials of different
length comparable, because the learning rate falls linearly to the end of each trial.
"""

from __future__ import annotations

from collections.abc import Sequence

from mlflow_pt_deploy.search.pareto import CompletedTrial
from mlflow_pt_deploy.search.space import TrialParams

_MIN_GAINS = 5  # like n_startup_trials of Optuna's MedianPruner


def should_prune(
    point: TrialParams, curve: Sequence[tuple[int, float]], finished: Sequence[CompletedTrial]
) -> str:
    """Return the reason to stop a running trial, or an empty string.

    Args:
        point: Parameters of the trial.
        curve: Epochs so far, counted from 1, and the validation accuracy after each.
        finished: The finished trials of the study.
    """
    share = curve[-1][0] / point.epochs
    if share >= 1:  # only the measurement is left, and the search learns from it
        return ""
    floor = _min_latency_ms(point, finished)
    rivals = [trial for trial in finished if trial.outcome.latency_ms <= floor]
    gains = [g for t in finished if t.point.kind == point.kind and (g := _gain(t, share)) >= 0]
    if not rivals or len(gains) < _MIN_GAINS:
        return ""
    best = max(rivals, key=lambda trial: trial.outcome.accuracy)
    now = max(accuracy for _, accuracy in curve)
    if now + max(gains) >= best.outcome.accuracy:
        return ""
    return (
        f"accuracy {now:.4f} after epoch {curve[-1][0]} of {point.epochs}: no trial gained more "
        f"than {max(gains):.4f} from there, and trial {best.number}, which is no slower, has "
        f"{best.outcome.accuracy:.4f}"
    )


def _min_latency_ms(point: TrialParams, finished: Sequence[CompletedTrial]) -> float:
    """Lower bound of the latency of a point in ms, before training; 0 without information.

    Latency depends on the shape only: a student is no faster than one of the same kind, variant and
    threads that is no larger in any dimension. The minimum of the measurements of a shape is used,
    because noise only adds time.
    """
    minimum: dict[tuple[float, ...], float] = {}
    for trial in finished:
        shape, latency = _shape(trial.point), trial.outcome.latency_ms
        no_larger = all(a <= b for a, b in zip(shape, _shape(point), strict=True))
        if _runtime(trial.point) == _runtime(point) and no_larger:
            minimum[shape] = min(latency, minimum.get(shape, latency))
    return max(minimum.values(), default=0.0)


def _shape(point: TrialParams) -> tuple[float, ...]:
    return point.layers, point.heads or float("inf"), point.width


def _runtime(point: TrialParams) -> tuple[str, str, int]:
    return point.kind, point.variant, point.threads


def _gain(trial: CompletedTrial, share: float) -> float:
    """Gain of a finished trial after a share of its epochs; -1 without a report by then.

    Uses the last report before that share, so the gain is an overestimate.
    """
    before = [a for step, a in trial.curve if step / trial.point.epochs <= share]
    return max(0.0, trial.outcome.accuracy - max(before)) if before else -1.0
