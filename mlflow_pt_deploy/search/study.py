"""The search itself: points drawn, tried, stopped early, and tried again if their process died.

A study lives in a database, outlives its processes, and several may work on it at once. Points are
proposed by Optuna's multi-objective TPE (Ozaki et al. 2022, doi:10.1613/jair.1.13188), which is
made for tens of trials; genetic algorithms want hundreds.
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

from mlflow_pt_deploy import interrupt
from mlflow_pt_deploy.errors import PtDeployError, SearchError
from mlflow_pt_deploy.search.early import hopeless
from mlflow_pt_deploy.search.front import Dropped, Finished, Found, Outcome
from mlflow_pt_deploy.search.space import Point, Space, propose
from mlflow_pt_deploy.search.storage import check_space, open_study
from mlflow_pt_deploy.search.trials import (
    CURVE,
    Watch,
    beating,
    counts,
    end,
    give_up,
    read_found,
    retry_forgotten,
    stop,
)

if TYPE_CHECKING:
    import optuna
    from optuna.samplers import TPESampler

_log = logging.getLogger(__name__)
_MISSED_BEATS = 6


@dataclass(frozen=True)
class Plan:
    """Which study, and how much of it.

    Attributes:
        study: Its name.
        storage: Address of its database, e.g. ``sqlite:///study.db`` or ``postgresql://...``.
        trials: Trials that the study shall have in all, those of earlier calls and of other
            processes included. Processes that draw at the same moment may make a few more.
        seconds: Time for this call.
        seed: Of the proposals.
        heartbeat_s: How often a running trial shows that it is alive; after six missed beats
            another process gives it up and tries its point again.
        wait_s: How long to wait for an SQLite file that another process has locked.

    Raises:
        SearchError: A number is out of range.
    """

    study: str
    storage: str
    trials: int
    seconds: float = math.inf
    seed: int = 0
    heartbeat_s: float = 10.0
    wait_s: float = 60.0

    def __post_init__(self) -> None:
        least = {"trials": 1, "seconds": 0.001, "seed": 0, "heartbeat_s": 0.001, "wait_s": 0}
        for name, low in least.items():
            if not (value := getattr(self, name)) >= low:
                raise SearchError(f"{name} of the search is {value}; give at least {low}.")


class Report:
    """What a running trial calls after each epoch.

    Attributes:
        number: Of the trial, unique in the study.
        late: Whether it was stopped because the time is over.
    """

    def __init__(
        self, study: optuna.Study, trial: optuna.Trial, point: Point, deadline: float
    ) -> None:
        self.number = trial.number
        self.late = False
        self._study, self._trial, self._point, self._deadline = study, trial, point, deadline
        self._curve: list[tuple[int, float]] = []

    def __call__(self, step: int, accuracy: float) -> None:
        """Record an epoch, counted from 1, and its validation accuracy.

        Raises:
            optuna.TrialPruned: The trial should end now; let it pass.
            SearchError: The accuracy is not a share.
        """
        import optuna

        if not 0 <= accuracy <= 1:
            raise SearchError(f"the accuracy after epoch {step} is {accuracy}, which is no share.")
        self._curve.append((step, accuracy))
        self._trial.set_user_attr(CURVE, self._curve)
        if time.monotonic() >= self._deadline:
            self.late = True
            raise optuna.TrialPruned(f"the time was over after epoch {step}")
        finished = read_found(self._study).finished
        if reason := hopeless(self._point, self._curve, finished):
            raise optuna.TrialPruned(reason)


Evaluate = Callable[[Point, Report], Outcome]
"""Trains and measures a point, and reports each epoch."""


def search(
    evaluate: Evaluate,
    space: Space,
    plan: Plan,
    *,
    on_trial: Callable[[Finished | Dropped], None] | None = None,
) -> Found:
    """Try students until the study has enough trials or the time is over.

    A trial whose process is killed, interrupted or out of time is tried again with the same
    parameters, by whoever works on the study then, three times at most. One that raises is recorded
    with the reason, and the search goes on. Where all that is left runs in other processes, it
    waits for them.

    Args:
        evaluate: See `Evaluate`. Latency must depend on the point's shape and variant alone.
        space: What to vary.
        plan: Which study, and how much.
        on_trial: Called after each trial of this process.

    Raises:
        SearchError: The database cannot be used, or the study has another space or other
            objectives, or was deleted meanwhile.
        MissingExtraError: Optuna is not installed.
    """
    deadline = time.monotonic() + plan.seconds
    watch = Watch(_MISSED_BEATS * plan.heartbeat_s)
    with open_study(plan.study, plan.storage, space, plan.wait_s) as study:
        retry_forgotten(study)
        while time.monotonic() < deadline:
            interrupt.check()
            check_space(study, space)
            for dead in watch.dead(study.get_trials(deepcopy=False)):
                give_up(study, dead.number)
            trials = study.get_trials(deepcopy=False)
            over = sum(counts(trial) for trial in trials)
            if over >= plan.trials:
                break
            if over + sum(trial.state.name == "RUNNING" for trial in trials) < plan.trials:
                number = _one_trial(study, evaluate, space, plan, deadline)
                if on_trial:
                    on_trial(_record(read_found(study), number))
            else:
                time.sleep(min(plan.heartbeat_s, 1.0))
        return read_found(study)


def _one_trial(
    study: optuna.Study, evaluate: Evaluate, space: Space, plan: Plan, deadline: float
) -> int:
    import optuna

    trial = study.ask()
    # By the number, so that neither a resumed process nor one beside it draws the same again.
    study.sampler = _sampler(plan.seed, trial.number)
    point = propose(trial, space)
    report = Report(study, trial, point, deadline)
    try:
        with beating(trial, plan.heartbeat_s):
            outcome = evaluate(point, report)
            values = [outcome.accuracy, outcome.latency_ms]
    except optuna.TrialPruned as pruned:
        if report.late:
            stop(study, trial, str(pruned))
        else:
            end(study, trial, "PRUNED", reason=str(pruned) or "stopped by its own code")
    except PtDeployError as error:
        end(study, trial, "FAIL", reason=str(error))
    except Exception as error:
        check_space(study, space)  # where the study is gone, the trial is not to blame
        _log.warning("trial %d of study %s failed", trial.number, plan.study, exc_info=True)
        end(study, trial, "FAIL", reason=f"{type(error).__name__}: {error}")
    except BaseException:
        with suppress(Exception):  # if the database fails too, the missing heartbeat tells
            stop(study, trial, "it was interrupted")
        raise
    else:
        end(study, trial, "COMPLETE", values=values)
    return trial.number


def _sampler(seed: int, number: int) -> TPESampler:
    from optuna.samplers import TPESampler

    (own,) = np.random.SeedSequence((seed, number)).generate_state(1)
    return TPESampler(seed=int(own), constant_liar=True)


def _record(found: Found, number: int) -> Finished | Dropped:
    every: tuple[Finished | Dropped, ...] = (*found.finished, *found.dropped)
    return next(record for record in every if record.number == number)
