"""Searches that are interrupted, killed or shared by several processes."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
import sqlalchemy
from tiny.search import SPACE, evaluate, fast_folder, numbers, points, start, stored

from mlflow_pt_deploy.search import Outcome, Report, StudyConfig, TrialParams, search
from mlflow_pt_deploy.search.space import propose
from mlflow_pt_deploy.search.trials import read_result


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with fast_folder(tmp_path) as path:
        yield path


@pytest.fixture
def config(folder: Path) -> StudyConfig:
    return StudyConfig("students", f"sqlite:///{folder}/study.db", trials=5, heartbeat_s=0.1)


def test_interrupted_search_resumes(config: StudyConfig) -> None:
    def interrupted(point: TrialParams, report: Report) -> Outcome:
        if report.number == 2:
            raise KeyboardInterrupt
        return evaluate(point, report)

    with pytest.raises(KeyboardInterrupt):
        search(interrupted, SPACE, config)
    states = [trial.state.name for trial in stored(config).trials]
    assert states == ["COMPLETE", "COMPLETE", "FAIL", "WAITING"]
    found = search(evaluate, SPACE, config)
    assert [trial.number for trial in found.finished] == [0, 1, 3, 4, 5]
    assert found.dropped[0].reason == "interrupted; retried as trial 3"
    assert found.finished[2].point == found.dropped[0].point


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_killed_search_loses_only_its_running_trial(config: StudyConfig, folder: Path) -> None:
    marker = folder / "hangs"
    process = start(config, marker, hang=2)
    wait_for(marker.exists)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = stored(config).trials
    assert [trial.state.name for trial in before] == ["COMPLETE", "COMPLETE", "RUNNING"]
    found = search(evaluate, SPACE, config)
    assert len(found.finished) == config.trials
    assert [trial.values for trial in before[:2]] == [
        [trial.outcome.accuracy, trial.outcome.latency_ms] for trial in found.finished[:2]
    ]
    (dead,) = found.dropped
    assert (dead.number, dead.state) == (2, "stopped")
    (retry,) = [trial for trial in found.finished if trial.point == dead.point]
    assert dead.reason == f"its process died; retried as trial {retry.number}"
    assert len(set(points(found))) == config.trials


def test_two_processes_share_a_study(config: StudyConfig, folder: Path) -> None:
    shared = replace(config, trials=9, heartbeat_s=10.0)
    processes = [start(shared, folder / "unused") for _ in range(2)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    found = search(evaluate, SPACE, shared)
    # both may sample the last one
    assert numbers(found) in (list(range(9)), list(range(10)))
    assert {record.state for record in found.dropped} <= {"pruned"}
    assert len(set(points(found))) == len(numbers(found)), "every point is sampled once"


def test_trial_that_ends_while_the_study_is_read_is_open(config: StudyConfig) -> None:
    search(evaluate, SPACE, replace(config, trials=1))
    study, other = stored(config), stored(config)
    running = [other.ask()]
    assert isinstance(study._storage, optuna.storages._CachedStorage)

    @sqlalchemy.event.listens_for(study._storage._backend.engine, "before_cursor_execute")
    def before_select(_connection: object, _cursor: object, sql: str, *_: object) -> None:
        if "FROM trial_values" in sql and running:  # the parameters were read before
            trial = running.pop()
            propose(trial, SPACE)
            other.tell(trial, [0.5, 1.0])

    found = read_result(study)
    assert not running
    assert numbers(found) == [0, 1]
    assert [(t.number, t.state, t.reason) for t in found.dropped] == [(1, "open", "running")]
    assert [trial.number for trial in read_result(study).finished] == [0, 1]


def test_search_waits_for_trials_of_other_processes(config: StudyConfig, folder: Path) -> None:
    marker = folder / "hangs"
    process = start(replace(config, heartbeat_s=0.05), marker, hang=0)
    wait_for(marker.exists)
    short = replace(config, trials=3, heartbeat_s=0.25, seconds=2.5)
    found = search(evaluate, SPACE, short)
    process.kill()
    process.wait()
    assert [trial.number for trial in found.finished] == [1, 2]
    assert [(t.number, t.state, t.reason) for t in found.dropped] == [(0, "open", "running")]


def test_process_killed_before_sampling_or_before_the_retry(config: StudyConfig) -> None:
    search(evaluate, SPACE, replace(config, trials=1))
    study = stored(config)
    study.ask()  # killed immediately: no point, no heartbeat
    half = study.ask()
    half.suggest_categorical("kind", ["transformer", "static"])
    study.tell(half, state=optuna.trial.TrialState.FAIL)  # marked as failed, but without a retry
    found = search(evaluate, SPACE, replace(config, trials=3))
    assert len(found.finished) == 3
    retried = {t.user_attrs.get("retry_of"): t for t in stored(config).trials}
    assert set(retried) == {None, 1, 2}
    assert retried[2].params["kind"] == half.params["kind"]
    assert [(t.state, t.point) for t in found.dropped] == [("stopped", None)] * 2


def test_trial_that_always_kills_its_process_fails(config: StudyConfig) -> None:
    search(evaluate, SPACE, replace(config, trials=1))
    for _ in range(3):
        doomed = stored(config).ask()
        stored(config).tell(doomed, state=optuna.trial.TrialState.FAIL)
        search(evaluate, SPACE, replace(config, trials=1))  # queues a retry
    found = search(evaluate, SPACE, replace(config, trials=3))
    assert [(t.number, t.state) for t in found.dropped] == [
        (1, "stopped"),
        (2, "stopped"),
        (3, "failed"),
    ]
    assert found.failed[0].reason == "its process died, 3 attempts"
    assert [trial.number for trial in found.finished] == [0, 4], "the failed trial counts"
    assert [t.user_attrs.get("retry_of") for t in stored(config).trials] == [None, None, 1, 2, None]


def test_process_whose_trial_was_abandoned_drops_its_result(
    config: StudyConfig, caplog: pytest.LogCaptureFixture
) -> None:
    def abandoned(point: TrialParams, report: Report) -> Outcome:
        outcome = evaluate(point, report)
        if report.number == 1:  # like another process after missed heartbeats
            stored(config).tell(1, state=optuna.trial.TrialState.FAIL)
        return outcome

    search(abandoned, SPACE, replace(config, trials=3))
    assert "trial 1 of study students was already ended by another process" in caplog.text
    found = search(evaluate, SPACE, replace(config, trials=4))
    assert [trial.number for trial in found.finished] == [0, 2, 3, 4]
