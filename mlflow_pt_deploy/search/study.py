"""Search loop: sample, evaluate and early-stop trials, and retry those whose process died.

A study is stored in a database, so several processes can share it and a search can be resumed.
Points are sampled by Optuna's multi-objective TPE (Ozaki et al. 2022, doi:10.1613/jair.1.13188),
which suits tens of trials; genetic algorithms need hundreds.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mlflow_pt_deploy.errors import PtDeployError, SearchError
from mlflow_pt_deploy.search.early_stopping import should_prune
from mlflow_pt_deploy.search.pareto import CompletedTrial, FailedTrial, Outcome, StudyResult
from mlflow_pt_deploy.search.space import Space, TrialParams, propose
from mlflow_pt_deploy.search.storage import check_space, open_study
from mlflow_pt_deploy.search.trials import (
    CURVE,
    KEPT_LOW,
    HeartbeatMonitor,
    abandon,
    finish,
    heartbeat,
    is_settled,
    read_result,
    retry_lost_trials,
    stop,
)
from mlflow_pt_deploy.system import interrupt

if TYPE_CHECKING:
    import optuna
    from optuna.samplers import TPESampler

_log = logging.getLogger(__name__)
_MAX_MISSED_HEARTBEATS = 6


@dataclass(frozen=True)
class StudyConfig:
    """Configuration of a search.

    Attributes:
        study: Name of the study.
        storage: URL of its database, e.g. ``sqlite:///study.db`` or ``postgresql://...``.
        trials: Total number of trials of the study, including those of earlier calls and of other
            processes. Processes that sample at the same moment may add a few more.
        seconds: Time limit of this call in seconds.
        seed: Random seed of the sampler.
        heartbeat_s: Heartbeat interval of a running trial in seconds. After six missed heartbeats
            another process marks the trial as dead and retries its point.
        wait_s: Seconds to wait for an SQLite file that another process has locked.

    Raises:
        SearchError: A value is out of range.
    """

    study: str
    storage: str
    trials: int
    seconds: float = math.inf
    seed: int = 0
    heartbeat_s: float = 10.0
    wait_s: float = 60.0

    def __post_init__(self) -> None:
        minimum = {"trials": 1, "seconds": 0.001, "seed": 0, "heartbeat_s": 0.001, "wait_s": 0}
        for name, low in minimum.items():
            if not (value := getattr(self, name)) >= low:
                raise SearchError(f"{name} of the search is {value}; give at least {low}.")


class Report:
    """Callback of a running trial, called after each epoch.

    Attributes:
        number: Trial number, unique in the study.
        timed_out: Whether the trial was stopped by the time limit.
    """

    def __init__(
        self, study: optuna.Study, trial: optuna.Trial, point: TrialParams, deadline: float
    ) -> None:
        self.number = trial.number
        self.timed_out = False
        self._study, self._trial, self._point, self._deadline = study, trial, point, deadline
        self._curve: list[tuple[int, float]] = []

    def __call__(self, step: int, accuracy: float) -> None:
        """Record the validation accuracy of an epoch, counted from 1.

        Raises:
            optuna.TrialPruned: The trial must end now; do not catch this exception.
            SearchError: The accuracy is NaN or out of range.
        """
        import optuna

        if not 0 <= accuracy <= 1:
            raise SearchError(
                f"the accuracy after epoch {step} is {accuracy}; it must be from 0 to 1."
            )
        self._curve.append((step, accuracy))
        self._trial.set_user_attr(CURVE, self._curve)
        if time.monotonic() >= self._deadline:
            self.timed_out = True
            raise optuna.TrialPruned(f"the time limit was reached after epoch {step}")
        finished = read_result(self._study).finished
        if reason := should_prune(self._point, self._curve, finished):
            raise optuna.TrialPruned(reason)


Evaluate = Callable[[TrialParams, Report], Outcome]
"""Trains and measures a point, and reports each epoch to the callback."""


def search(
    evaluate: Evaluate,
    space: Space,
    config: StudyConfig,
    *,
    on_trial: Callable[[CompletedTrial | FailedTrial], None] | None = None,
) -> StudyResult:
    """Run trials until the study has enough of them or the time limit is reached.

    A trial whose process is killed, interrupted or out of time is retried with the same parameters
    by any process of the study, up to three attempts. A trial that raises is recorded with the
    reason, and the search continues. If all remaining trials run in other processes, the search
    waits for them.

    Args:
        evaluate: See `Evaluate`. The latency must depend on the point's shape and variant only.
        space: Search space.
        config: Study, number of trials and time limit.
        on_trial: Called after each trial of this process.

    Raises:
        SearchError: The database cannot be used, the study has another space or other objectives,
            or the study was deleted during the search.
        MissingExtraError: Optuna is not installed.
    """
    deadline = time.monotonic() + config.seconds
    monitor = HeartbeatMonitor(_MAX_MISSED_HEARTBEATS * config.heartbeat_s)
    with open_study(config.study, config.storage, space, config.wait_s) as study:
        retry_lost_trials(study)
        while time.monotonic() < deadline:
            interrupt.check()
            check_space(study, space)
            for dead in monitor.dead_trials(study.get_trials(deepcopy=False)):
                abandon(study, dead.number)
            trials = study.get_trials(deepcopy=False)
            settled = sum(is_settled(trial) for trial in trials)
            if settled >= config.trials:
                break
            if settled + sum(trial.state.name == "RUNNING" for trial in trials) < config.trials:
                number = _run_trial(study, evaluate, space, config, deadline)
                if on_trial:
                    on_trial(_record(read_result(study), number))
            else:
                time.sleep(min(config.heartbeat_s, 1.0))
        return read_result(study)


def _run_trial(
    study: optuna.Study, evaluate: Evaluate, space: Space, config: StudyConfig, deadline: float
) -> int:
    import optuna

    trial = study.ask()
    # Seeded by the trial number: no process of the study samples the same point twice.
    study.sampler = _sampler(config.seed, trial.number)
    point = propose(trial, space)
    report = Report(study, trial, point, deadline)
    try:
        with heartbeat(trial, config.heartbeat_s):
            outcome = evaluate(point, report)
            values = [outcome.accuracy, outcome.latency_ms]
            trial.set_user_attr(KEPT_LOW, outcome.kept_low)
    except optuna.TrialPruned as pruned:
        if report.timed_out:
            stop(study, trial, str(pruned))
        else:
            finish(study, trial, "PRUNED", reason=str(pruned) or "stopped by the evaluation")
    except PtDeployError as error:
        finish(study, trial, "FAIL", reason=str(error))
    except Exception as error:
        check_space(study, space)  # the cause may be that the study was deleted
        _log.warning("trial %d of study %s failed", trial.number, config.study, exc_info=True)
        finish(study, trial, "FAIL", reason=f"{type(error).__name__}: {error}")
    except BaseException:
        with suppress(Exception):  # if the database fails too, the missing heartbeat shows it
            stop(study, trial, "interrupted")
        raise
    else:
        finish(study, trial, "COMPLETE", values=values)
    return trial.number


def _sampler(seed: int, number: int) -> TPESampler:
    from optuna.samplers import TPESampler

    (trial_seed,) = np.random.SeedSequence((seed, number)).generate_state(1)
    return TPESampler(seed=int(trial_seed), constant_liar=True)


def _record(result: StudyResult, number: int) -> CompletedTrial | FailedTrial:
    records: tuple[CompletedTrial | FailedTrial, ...] = (*result.finished, *result.dropped)
    return next(record for record in records if record.number == number)
