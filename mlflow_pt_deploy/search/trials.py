"""Stored trials: heartbeats, final states, retries and results.

Optuna's own heartbeats are not used: they never detect a trial that was killed before its first
heartbeat, and they end the search of a process whose trial was marked as failed (optuna#5470).
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
_MAX_ATTEMPTS = 3  # a trial may kill its process every time, e.g. by using too much memory

# user attributes of a trial
CURVE, KEPT_LOW = "curve", "kept_low"
_HEARTBEAT, _REASON, _STOPPED = "beat", "reason", "stopped"
_ATTEMPT, _RETRY_OF = "attempt", "retry_of"


@contextmanager
def heartbeat(trial: optuna.Trial, every_s: float) -> Iterator[None]:
    """Increment a user attribute of the trial every `every_s` seconds, from a thread."""
    import optuna

    stopped = threading.Event()

    def beat() -> None:
        for count in itertools.count(1):
            if stopped.wait(every_s):
                break
            # One missed heartbeat has no effect; only several in a row do.
            with suppress(optuna.exceptions.OptunaError, KeyError):
                trial.set_user_attr(_HEARTBEAT, count)
        trial.storage.remove_session()

    thread = threading.Thread(target=beat, name=f"heartbeat of trial {trial.number}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


class HeartbeatMonitor:
    """Finds trials whose process is dead, by a heartbeat that has stopped.

    The time is measured by this process only, so the clocks of other machines do not matter.

    Args:
        timeout_s: Seconds without a heartbeat after which a trial is_settled as dead.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._seen: dict[int, tuple[int, float]] = {}

    def dead_trials(self, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """Return the running trials of a study whose process is dead."""
        now, dead = time.monotonic(), []
        for trial in trials:
            if trial.state.name != "RUNNING":
                continue
            beat = trial.user_attrs.get(_HEARTBEAT, 0)
            before, since = self._seen.setdefault(trial.number, (beat, now))
            if beat != before:
                self._seen[trial.number] = (beat, now)
            elif now - since > self._timeout_s:
                dead.append(trial)
        return dead


def finish(
    study: optuna.Study,
    trial: optuna.Trial,
    state: str,
    *,
    reason: str = "",
    values: Sequence[float] | None = None,
) -> None:
    """Record the final state of a trial of this process: ``COMPLETE``, ``PRUNED`` or ``FAIL``."""
    _tell(study, trial, state, values, {_REASON: reason} if reason else {})


def stop(study: optuna.Study, trial: optuna.Trial, reason: str) -> None:
    """Stop a trial of this process without a result, and queue a retry of its point."""
    if stopped := _tell(study, trial, "FAIL", None, {_STOPPED: reason}):
        _retry(study, stopped)


def abandon(study: optuna.Study, number: int) -> None:
    """Mark a trial whose process is dead as failed, and queue a retry of its point."""
    if dead := _tell(study, number, "FAIL"):
        _retry(study, dead)


def _tell(
    study: optuna.Study,
    trial: optuna.Trial | int,
    state: str,
    values: Sequence[float] | None = None,
    attributes: Mapping[str, str] = MappingProxyType({}),
) -> FrozenTrial | None:
    """Set the final state of a trial; None if another process has already set it."""
    import optuna

    try:
        for name, text in attributes.items():
            assert not isinstance(trial, int)
            trial.set_user_attr(name, text[:2000])
        return study.tell(trial, values, optuna.trial.TrialState[state])
    except (optuna.exceptions.UpdateFinishedTrialError, ValueError):
        number = trial if isinstance(trial, int) else trial.number
        _log.warning(
            "trial %d of study %s was already ended by another process", number, study.study_name
        )
        return None


def _retry(study: optuna.Study, trial: FrozenTrial) -> None:
    """Queue a trial's point again, unless it has reached the maximum number of attempts."""
    import optuna

    attempt = trial.user_attrs.get(_ATTEMPT, 1)
    if _REASON in trial.user_attrs or attempt >= _MAX_ATTEMPTS:
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
    """Queue retries that are missing because a process died between failure and retry."""
    trials = study.get_trials(deepcopy=False)
    retried = _retries(trials)
    for trial in trials:
        if trial.state.name == "FAIL" and trial.number not in retried:
            _retry(study, trial)


def is_settled(trial: FrozenTrial) -> bool:
    """Whether a trial has its final state; a trial that is retried has not."""
    if trial.state.name == "FAIL":
        attrs = trial.user_attrs
        return _REASON in attrs or attrs.get(_ATTEMPT, 1) >= _MAX_ATTEMPTS
    return trial.state.is_finished()


def read_result(study: optuna.Study) -> StudyResult:
    """Read all trials of a study.

    Trials are classified by their state, which Optuna reads first. It reads parameters and values
    with separate queries, so a trial that another process ends in between is still running here and
    may have values but no parameters.
    """
    trials = study.get_trials(deepcopy=False)
    retried = _retries(trials)
    records = [
        _completed(t) if t.state.name == "COMPLETE" else _failed(t, retried.get(t.number))
        for t in trials
    ]
    return StudyResult(
        tuple(record for record in records if isinstance(record, CompletedTrial)),
        tuple(record for record in records if isinstance(record, FailedTrial)),
    )


def _retries(trials: Sequence[FrozenTrial]) -> dict[int, int]:
    """Numbers of retried trials, mapped to the numbers of their retries."""
    return {t.user_attrs[_RETRY_OF]: t.number for t in trials if _RETRY_OF in t.user_attrs}


def _completed(trial: FrozenTrial) -> CompletedTrial:
    point = read_point(trial.params)
    assert point is not None, "a completed trial has all parameters"
    curve = tuple((step, accuracy) for step, accuracy in trial.user_attrs.get(CURVE, ()))
    accuracy, latency_ms = trial.values
    outcome = Outcome(accuracy, latency_ms, trial.user_attrs.get(KEPT_LOW))
    return CompletedTrial(trial.number, point, outcome, curve)


def _failed(trial: FrozenTrial, retry: int | None) -> FailedTrial:
    attrs, point = trial.user_attrs, read_point(trial.params)
    if not trial.state.is_finished():
        return FailedTrial(trial.number, point, "open", trial.state.name.lower())
    if reason := attrs.get(_REASON):
        return FailedTrial(
            trial.number, point, "pruned" if trial.state.name == "PRUNED" else "failed", reason
        )
    cause = attrs.get(_STOPPED, "its process died")
    if is_settled(trial):
        return FailedTrial(trial.number, point, "failed", f"{cause}, {_MAX_ATTEMPTS} attempts")
    next_step = "will be retried" if retry is None else f"retried as trial {retry}"
    return FailedTrial(trial.number, point, "stopped", f"{cause}; {next_step}")
