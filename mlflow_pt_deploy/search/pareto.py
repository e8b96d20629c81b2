"""Results of a search, their Pareto front, and the selection of a trial."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mlflow_pt_deploy.errors import SearchError
from mlflow_pt_deploy.search.space import TrialParams
from mlflow_pt_deploy.selection.policy import Policy


@dataclass(frozen=True)
class Outcome:
    """Measured objectives of a trial.

    Attributes:
        accuracy: Accuracy on validation, 0 to 1.
        latency_ms: Measured latency of one row in milliseconds.
        kept_low: Share of the teacher's accuracy that is kept with 95 % confidence; None: unknown.

    Raises:
        SearchError: A value is NaN or out of range.
    """

    accuracy: float
    latency_ms: float
    kept_low: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.accuracy <= 1:
            raise SearchError(f"accuracy is {self.accuracy}; it must be from 0 to 1.")
        if not 0 < self.latency_ms < math.inf:
            raise SearchError(f"latency_ms is {self.latency_ms}; it must be above 0.")


@dataclass(frozen=True)
class CompletedTrial:
    """A trial that was trained and measured.

    Attributes:
        number: Trial number, unique in the study.
        point: Parameters of the trial.
        outcome: Measured accuracy and latency.
        curve: Epochs, counted from 1, and the validation accuracy after each.
    """

    number: int
    point: TrialParams
    outcome: Outcome
    curve: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class FailedTrial:
    """A trial without an outcome.

    Attributes:
        number: Trial number, unique in the study.
        point: Parameters of the trial; None if its process died before they were sampled.
        state: ``pruned`` (stopped early), ``failed`` (an error; not retried), ``stopped`` (killed,
            interrupted or out of time; retried) or ``open`` (waiting, or running in another
            process).
        reason: Reason as text.
    """

    number: int
    point: TrialParams | None
    state: Literal["pruned", "failed", "stopped", "open"]
    reason: str


@dataclass(frozen=True)
class StudyResult:
    """All trials of a study, including those of other processes, ordered by number."""

    finished: tuple[CompletedTrial, ...]
    dropped: tuple[FailedTrial, ...]

    @property
    def front(self) -> tuple[CompletedTrial, ...]:
        """The Pareto front, fastest first."""
        return tuple(self.finished[i] for i in pareto([t.outcome for t in self.finished]))

    @property
    def failed(self) -> tuple[FailedTrial, ...]:
        """Trials that ended with an error."""
        return tuple(trial for trial in self.dropped if trial.state == "failed")


@dataclass(frozen=True)
class SelectedTrial:
    """The selected trial.

    Attributes:
        trial: A trial of the Pareto front.
        meets: Whether it reaches the required accuracy.
        reason: Explanation as text.
    """

    trial: CompletedTrial
    meets: bool
    reason: str


def pareto(outcomes: Sequence[Outcome]) -> list[int]:
    """Return the indices of the Pareto-optimal outcomes, fastest first.

    An outcome dominates another if it is at least as fast and as accurate, and better in one of the
    two. Equal outcomes are all kept, in their given order.
    """
    order = sorted(
        range(len(outcomes)), key=lambda i: (outcomes[i].latency_ms, -outcomes[i].accuracy)
    )
    front: list[int] = []
    for index in order:
        best = outcomes[front[-1]] if front else None
        if best is None or outcomes[index].accuracy > best.accuracy or outcomes[index] == best:
            front.append(index)
    return front


def choose_point(result: StudyResult, policy: Policy, reference: float) -> SelectedTrial:
    """Select the fastest trial that reaches the required accuracy, or else the most accurate.

    Args:
        result: Result of `search`.
        policy: `retain` and `retain_low` are required of the trial.
        reference: Accuracy of the teacher on validation.

    Raises:
        SearchError: No trial finished; the message contains the first failure.
    """
    if not (front := result.front):
        raise SearchError(_no_trial_message(result))
    minimum = policy.retain * reference
    required = f"{minimum:.4f} ({policy.retain:g} of the teacher's {reference:.4f})"
    if policy.retain_low:
        required += f" and of {policy.retain_low:g} of it with 95 % confidence"
    # tolerance for rounding, as in `selection.choice`
    accurate = [
        trial
        for trial in front
        if trial.outcome.accuracy >= minimum - 1e-9
        and (trial.outcome.kept_low is None or trial.outcome.kept_low >= policy.retain_low)
    ]
    chosen = accurate[0] if accurate else front[-1]
    outcome = chosen.outcome
    what = (
        f"Trial {chosen.number}, {chosen.point}, has a latency of {outcome.latency_ms:.3g} ms and "
        f"a validation accuracy of {outcome.accuracy:.4f}"
    )
    if accurate:
        reason = (
            f"{what}: the fastest of {len(result.finished)} finished trials with an accuracy of at "
            f"least {required}."
        )
    else:
        reason = (
            f"{what}: the most accurate of {len(result.finished)} finished trials, none of which "
            f"reaches {required}. Search longer, widen the space, or lower retain."
        )
    return SelectedTrial(chosen, bool(accurate), reason)


def _no_trial_message(result: StudyResult) -> str:
    counts = [
        f"{sum(trial.state == state for trial in result.dropped)} {state}"
        for state in ("failed", "pruned", "stopped", "open")
    ]
    first = f" First failure: {result.failed[0].reason}" if result.failed else ""
    return (
        f"no trial of the search finished ({', '.join(counts)}).{first} Fix the failure, or give "
        "the search more time."
    )
