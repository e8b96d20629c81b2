"""Searches that are killed, interrupted, given up and shared; what is lost is one trial's work."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
import sqlalchemy
from tiny_search import SPACE, evaluate, fast_folder, numbers, points, start, stored

from mlflow_pt_deploy.search import Outcome, Report, StudyConfig, TrialParams, search
from mlflow_pt_deploy.search.space import propose
from mlflow_pt_deploy.search.trials import read_found


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with fast_folder(tmp_path) as path:
        yield path


@pytest.fixture
def plan(folder: Path) -> StudyConfig:
    return StudyConfig("students", f"sqlite:///{folder}/study.db", trials=5, heartbeat_s=0.1)


def test_an_interrupted_search_goes_on_where_it_was(plan: StudyConfig) -> None:
    def interrupted(point: TrialParams, report: Report) -> Outcome:
        if report.number == 2:
            raise KeyboardInterrupt
        return evaluate(point, report)

    with pytest.raises(KeyboardInterrupt):
        search(interrupted, SPACE, plan)
    states = [trial.state.name for trial in stored(plan).trials]
    assert states == ["COMPLETE", "COMPLETE", "FAIL", "WAITING"]
    found = search(evaluate, SPACE, plan)
    assert [trial.number for trial in found.finished] == [0, 1, 3, 4, 5]
    assert found.dropped[0].reason == "it was interrupted; tried again as trial 3"
    assert found.finished[2].point == found.dropped[0].point


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_killed_search_loses_nothing_but_the_trial_it_was_in(
    plan: StudyConfig, folder: Path
) -> None:
    marker = folder / "hangs"
    process = start(plan, marker, hang=2)
    wait_for(marker.exists)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = stored(plan).trials
    assert [trial.state.name for trial in before] == ["COMPLETE", "COMPLETE", "RUNNING"]
    found = search(evaluate, SPACE, plan)
    assert len(found.finished) == plan.trials
    assert [trial.values for trial in before[:2]] == [
        [trial.outcome.accuracy, trial.outcome.latency_ms] for trial in found.finished[:2]
    ]
    (dead,) = found.dropped
    assert (dead.number, dead.state) == (2, "stopped")
    (again,) = [trial for trial in found.finished if trial.point == dead.point]
    assert dead.reason == f"its process died; tried again as trial {again.number}"
    assert len(set(points(found))) == plan.trials


def test_two_processes_share_a_study(plan: StudyConfig, folder: Path) -> None:
    shared = replace(plan, trials=9, heartbeat_s=10.0)
    processes = [start(shared, folder / "unused") for _ in range(2)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    found = search(evaluate, SPACE, shared)
    # both may draw the last one
    assert numbers(found) in (list(range(9)), list(range(10)))
    assert {record.state for record in found.dropped} <= {"pruned"}
    assert len(set(points(found))) == len(numbers(found)), "no point twice"


def test_a_trial_that_ends_while_the_study_is_read_is_open(plan: StudyConfig) -> None:
    search(evaluate, SPACE, replace(plan, trials=1))
    study, beside = stored(plan), stored(plan)
    running = [beside.ask()]
    assert isinstance(study._storage, optuna.storages._CachedStorage)

    @sqlalchemy.event.listens_for(study._storage._backend.engine, "before_cursor_execute")
    def before_select(_connection: object, _cursor: object, sql: str, *_: object) -> None:
        if "FROM trial_values" in sql and running:  # the parameters are read
            trial = running.pop()
            propose(trial, SPACE)
            beside.tell(trial, [0.5, 1.0])

    found = read_found(study)
    assert not running
    assert numbers(found) == [0, 1]
    assert [(t.number, t.state, t.reason) for t in found.dropped] == [(1, "open", "it is running")]
    assert [trial.number for trial in read_found(study).finished] == [0, 1]


def test_what_runs_elsewhere_is_waited_for(plan: StudyConfig, folder: Path) -> None:
    marker = folder / "hangs"
    process = start(replace(plan, heartbeat_s=0.05), marker, hang=0)
    wait_for(marker.exists)
    patient = replace(plan, trials=3, heartbeat_s=0.25, seconds=2.5)
    found = search(evaluate, SPACE, patient)
    process.kill()
    process.wait()
    assert [trial.number for trial in found.finished] == [1, 2]
    assert [(t.number, t.state, t.reason) for t in found.dropped] == [(0, "open", "it is running")]


def test_killed_before_its_point_was_drawn_or_before_it_was_queued_again(plan: StudyConfig) -> None:
    search(evaluate, SPACE, replace(plan, trials=1))
    study = stored(plan)
    study.ask()  # killed at once: no point, no heartbeat
    half = study.ask()
    half.suggest_categorical("kind", ["transformer", "static"])
    study.tell(half, state=optuna.trial.TrialState.FAIL)  # given up, but not queued again
    found = search(evaluate, SPACE, replace(plan, trials=3))
    assert len(found.finished) == 3
    retried = {t.user_attrs.get("retry_of"): t for t in stored(plan).trials}
    assert set(retried) == {None, 1, 2}
    assert retried[2].params["kind"] == half.params["kind"]
    assert [(t.state, t.point) for t in found.dropped] == [("stopped", None)] * 2


def test_a_trial_that_always_kills_its_process_is_given_up(plan: StudyConfig) -> None:
    search(evaluate, SPACE, replace(plan, trials=1))
    for _ in range(3):
        doomed = stored(plan).ask()
        stored(plan).tell(doomed, state=optuna.trial.TrialState.FAIL)
        search(evaluate, SPACE, replace(plan, trials=1))  # queues it again
    found = search(evaluate, SPACE, replace(plan, trials=3))
    assert [(t.number, t.state) for t in found.dropped] == [
        (1, "stopped"),
        (2, "stopped"),
        (3, "failed"),
    ]
    assert found.failed[0].reason == "its process died, 3 times"
    assert [trial.number for trial in found.finished] == [0, 4], "the failed one counts"
    assert [t.user_attrs.get("retry_of") for t in stored(plan).trials] == [None, None, 1, 2, None]


def test_a_process_that_was_given_up_drops_its_result_and_goes_on(
    plan: StudyConfig, caplog: pytest.LogCaptureFixture
) -> None:
    def given_up(point: TrialParams, report: Report) -> Outcome:
        outcome = evaluate(point, report)
        if report.number == 1:  # as another process would, had this one slept for long
            stored(plan).tell(1, state=optuna.trial.TrialState.FAIL)
        return outcome

    search(given_up, SPACE, replace(plan, trials=3))
    assert "trial 1 of study students was ended by another process" in caplog.text
    found = search(evaluate, SPACE, replace(plan, trials=4))
    assert [trial.number for trial in found.finished] == [0, 2, 3, 4]
