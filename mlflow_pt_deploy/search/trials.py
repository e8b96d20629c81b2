"""A trial as the study stores it: alive or dead, ended, tried again, and read back.

Heartbeats are our own: Optuna's never give up a trial that was killed before its first one, and end
the search of a process whose trial was given up (optuna#5470).
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import MappingProxyType
from typing import TYPE_CHECKING

from mlflow_pt_deploy.search.pareto import CompletedTrial, FailedTrial, Outcome, StudyResult
from mlflow_pt_deploy.search.space import read_point

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

_log = logging.getLogger(__name__)
_ATTEMPTS = 3  # a trial that kills its process, for want of memory say, would do so for ever

# what is written beside a trial
CURVE, _BEAT, _REASON, _STOPPED = "curve", "beat", "reason", "stopped"
_ATTEMPT, _RETRY_OF = "attempt", "retry_of"


@contextmanager
def heartbeat(trial: optuna.Trial, every_s: float) -> Iterator[None]:
    """Count up a number beside the trial, so that others see that its process lives."""
    import optuna

    over = threading.Event()

    def beat() -> None:
        for count in itertools.count(1):
            if over.wait(every_s):
                break
            # A missed beat is no fault: several must be missed before anyone acts on it.
            with suppress(optuna.exceptions.OptunaError, KeyError):
                trial.set_user_attr(_BEAT, count)
        trial.storage.remove_session()

    thread = threading.Thread(target=beat, name=f"heartbeat of trial {trial.number}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class Watch:
    """Finds trials whose process is dead: their heartbeat stood still for a while.

    The while is measured by this process alone, so clocks of other machines do not matter, nor how
    early in its trial a process was killed.

    Args:
        patience_s: How long a heartbeat may stand still.
    """

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._seen: dict[int, tuple[int, float]] = {}

    def dead(self, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """Those of a study's trials that nobody runs any more."""
        now, found = time.monotonic(), []
        for trial in trials:
            if trial.state.name != "RUNNING":
                continue
            beat = trial.user_attrs.get(_BEAT, 0)
            before, since = self._seen.setdefault(trial.number, (beat, now))
            if beat != before:
                self._seen[trial.number] = (beat, now)
            elif now - since > self._patience_s:
                found.append(trial)
        return found


def end(
    study: optuna.Study,
    trial: optuna.Trial,
    state: str,
    *,
    reason: str = "",
    values: Sequence[float] | None = None,
) -> None:
    """End a trial of this process for good: ``COMPLETE``, ``PRUNED`` or ``FAIL``."""
    _tell(study, trial, state, values, {_REASON: reason} if reason else {})


def stop(study: optuna.Study, trial: optuna.Trial, why: str) -> None:
    """End a trial of this process that says nothing of its point, and have it tried again."""
    if stopped := _tell(study, trial, "FAIL", None, {_STOPPED: why}):
        _retry(study, stopped)


def give_up(study: optuna.Study, number: int) -> None:
    """End a trial whose process is dead, and have its point tried again."""
    if dead := _tell(study, number, "FAIL"):
        _retry(study, dead)


def _tell(
    study: optuna.Study,
    trial: optuna.Trial | int,
    state: str,
    values: Sequence[float] | None = None,
    notes: Mapping[str, str] = MappingProxyType({}),
) -> FrozenTrial | None:
    """End a trial in the study; None if another process already has, which only one can."""
    import optuna

    try:
        for name, text in notes.items():
            assert not isinstance(trial, int)
            trial.set_user_attr(name, text[:2000])
        return study.tell(trial, values, optuna.trial.TrialState[state])
    except (optuna.exceptions.UpdateFinishedTrialError, ValueError):
        number = trial if isinstance(trial, int) else trial.number
        _log.warning("trial %d of study %s was ended by another process", number, study.study_name)
        return None


def _retry(study: optuna.Study, trial: FrozenTrial) -> None:
    """Put a trial's point at the head of the queue, unless it was tried often enough."""
    import optuna

    attempt = trial.user_attrs.get(_ATTEMPT, 1)
    if _REASON in trial.user_attrs or attempt >= _ATTEMPTS:
        return
    study.add_trial(
        optuna.create_trial(
            state=optuna.trial.TrialState.WAITING,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs={_ATTEMPT: attempt + 1, _RETRY_OF: trial.number},
        )
    )


def retry_lost_trials(study: optuna.Study) -> None:
    """Try points again whose process was killed between ending a trial and queueing it again."""
    trials = study.get_trials(deepcopy=False)
    retried = _retries(trials)
    for trial in trials:
        if trial.state.name == "FAIL" and trial.number not in retried:
            _retry(study, trial)


def counts(trial: FrozenTrial) -> bool:
    """Whether a trial is over for good; one whose point is tried again is not."""
    if trial.state.name == "FAIL":
        attrs = trial.user_attrs
        return _REASON in attrs or attrs.get(_ATTEMPT, 1) >= _ATTEMPTS
    return trial.state.is_finished()


def read_found(study: optuna.Study) -> StudyResult:
    """All trials of a study.

    By their state, which Optuna reads first: it reads a trial's parameters and values in selects of
    their own, so a trial that another process ends meanwhile is running, and may have values but no
    parameters yet.
    """
    trials = study.get_trials(deepcopy=False)
    retried = _retries(trials)
    records = [
        _finished(t) if t.state.name == "COMPLETE" else _dropped(t, retried.get(t.number))
        for t in trials
    ]
    return StudyResult(
        tuple(record for record in records if isinstance(record, CompletedTrial)),
        tuple(record for record in records if isinstance(record, FailedTrial)),
    )


def _retries(trials: Sequence[FrozenTrial]) -> dict[int, int]:
    """Numbers of trials that were tried again, and of the trials that did."""
    return {t.user_attrs[_RETRY_OF]: t.number for t in trials if _RETRY_OF in t.user_attrs}


def _finished(trial: FrozenTrial) -> CompletedTrial:
    point = read_point(trial.params)
    assert point is not None, "a trial ends after its point is drawn"
    curve = tuple((step, accuracy) for step, accuracy in trial.user_attrs.get(CURVE, ()))
    return CompletedTrial(trial.number, point, Outcome(*trial.values), curve)


def _dropped(trial: FrozenTrial, again: int | None) -> FailedTrial:
    attrs, point = trial.user_attrs, read_point(trial.params)
    if not trial.state.is_finished():
        return FailedTrial(trial.number, point, "open", f"it is {trial.state.name.lower()}")
    if reason := attrs.get(_REASON):
        return FailedTrial(
            trial.number, point, "pruned" if trial.state.name == "PRUNED" else "failed", reason
        )
    why = attrs.get(_STOPPED, "its process died")
    if counts(trial):
        return FailedTrial(trial.number, point, "failed", f"{why}, {_ATTEMPTS} times")
    following = "to be tried again" if again is None else f"tried again as trial {again}"
    return FailedTrial(trial.number, point, "stopped", f"{why}; {following}")
