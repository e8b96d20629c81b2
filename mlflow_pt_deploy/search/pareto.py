"""What a search found, those of it that nothing beats, and which of them to take.

Pure: reads records and touches nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mlflow_pt_deploy.errors import PolicyError, SearchError
from mlflow_pt_deploy.search.space import TrialParams


@dataclass(frozen=True)
class Outcome:
    """What a student was worth.

    Attributes:
        accuracy: Share of validation rows that it labels right.
        latency_ms: Measured time of one row.

    Raises:
        SearchError: A number is none, or out of range.
    """

    accuracy: float
    latency_ms: float

    def __post_init__(self) -> None:
        if not 0 <= self.accuracy <= 1:
            raise SearchError(f"accuracy is {self.accuracy}; it is a share, from 0 to 1.")
        if not 0 < self.latency_ms < math.inf:
            raise SearchError(f"latency_ms is {self.latency_ms}; it is a time above 0.")


@dataclass(frozen=True)
class CompletedTrial:
    """A trial that was trained and measured.

    Attributes:
        number: Unique in the study.
        point: What was tried.
        outcome: What it was worth.
        curve: Epochs and the validation accuracy after each.
    """

    number: int
    point: TrialParams
    outcome: Outcome
    curve: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class FailedTrial:
    """A trial without an outcome.

    Attributes:
        number: Unique in the study.
        point: What was tried; None if its process died before it had one.
        state: ``pruned`` (hopeless), ``failed`` (an error; not tried again), ``stopped`` (killed,
            interrupted or out of time; tried again) or ``open`` (waiting, or running elsewhere).
        reason: In words.
    """

    number: int
    point: TrialParams | None
    state: Literal["pruned", "failed", "stopped", "open"]
    reason: str


@dataclass(frozen=True)
class StudyResult:
    """All trials of a study, those of other processes included, by their number."""

    finished: tuple[CompletedTrial, ...]
    dropped: tuple[FailedTrial, ...]

    @property
    def front(self) -> tuple[CompletedTrial, ...]:
        """Trials that no other beats, the fastest first."""
        return tuple(self.finished[i] for i in pareto([t.outcome for t in self.finished]))

    @property
    def failed(self) -> tuple[FailedTrial, ...]:
        """Trials that ended with an error."""
        return tuple(trial for trial in self.dropped if trial.state == "failed")


@dataclass(frozen=True)
class SelectedTrial:
    """The trial to take.

    Attributes:
        trial: One of the front.
        meets: Whether it is as accurate as was asked for.
        reason: One paragraph for a person who was not there.
    """

    trial: CompletedTrial
    meets: bool
    reason: str


def pareto(outcomes: Sequence[Outcome]) -> list[int]:
    """Indices of the outcomes that no other dominates, the fastest first.

    One dominates another if it is at least as fast and as accurate, and better in one of the two.
    So of equal outcomes all stay, and stand in their given order.
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


def choose_point(found: StudyResult, retain: float, reference: float) -> SelectedTrial:
    """The fastest trial of the front that keeps the accuracy, or else the most accurate.

    Args:
        found: What `search` returned.
        retain: Least share of `reference` to keep, 0 to 1.
        reference: Accuracy of the teacher on validation.

    Raises:
        PolicyError: `retain` makes no sense.
        SearchError: No trial finished; the message has the first failure.
    """
    if not 0 <= retain <= 1:
        raise PolicyError(
            f"retain is {retain!r}; give the share of the teacher's accuracy to keep as a number "
            "from 0 to 1, e.g. 0.99."
        )
    if not (front := found.front):
        raise SearchError(_nothing(found))
    least = retain * reference
    asked = f"{least:.4f} ({retain:g} of the teacher's {reference:.4f})"
    # equal up to rounding is equal, as in `policy`
    kept = [trial for trial in front if trial.outcome.accuracy >= least - 1e-9]
    chosen = kept[0] if kept else front[-1]
    outcome = chosen.outcome
    what = (
        f"Trial {chosen.number}, {chosen.point}, answers in {outcome.latency_ms:.3g} ms with a "
        f"validation accuracy of {outcome.accuracy:.4f}"
    )
    if kept:
        reason = (
            f"{what}: the fastest of {len(found.finished)} finished trials with {asked} or more."
        )
    else:
        reason = (
            f"{what}: the most accurate of {len(found.finished)} finished trials, none of which "
            f"reaches {asked}. Search longer, widen the space, or lower retain."
        )
    return SelectedTrial(chosen, bool(kept), reason)


def _nothing(found: StudyResult) -> str:
    counts = [
        f"{sum(trial.state == state for trial in found.dropped)} {state}"
        for state in ("failed", "pruned", "stopped", "open")
    ]
    first = f" The first failure: {found.failed[0].reason}" if found.failed else ""
    return (
        f"no trial of the search finished ({', '.join(counts)}), so there is nothing to choose "
        f"from.{first} Cure that, or give the search more time."
    )
