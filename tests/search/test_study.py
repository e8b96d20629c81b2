"""The search loop on real SQLite files: results, resuming, failures and database errors."""

from __future__ import annotations

import itertools
import logging
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from tiny.search import SPACE, evaluate, fast_folder, numbers, objective, points

from mlflow_pt_deploy.errors import DataError, SearchError
from mlflow_pt_deploy.search import (
    CompletedTrial,
    FailedTrial,
    Outcome,
    Report,
    Space,
    StudyConfig,
    TrialParams,
    search,
)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with fast_folder(tmp_path) as path:
        yield path


@pytest.fixture
def config(folder: Path) -> StudyConfig:
    return StudyConfig("students", f"sqlite:///{folder}/study.db", trials=5, heartbeat_s=0.1)


def test_search_finds_the_pareto_front_within_the_space(config: StudyConfig) -> None:
    reported: list[CompletedTrial | FailedTrial] = []
    found = search(evaluate, SPACE, replace(config, trials=20), on_trial=reported.append)
    assert numbers(found) == [record.number for record in reported] == list(range(20))
    for trial in found.finished:
        assert trial.outcome == objective(trial.point)
        assert len(trial.curve) == trial.point.epochs
        assert trial.curve[-1] == (trial.point.epochs, trial.outcome.accuracy)
    for point in points(found):
        ranges = SPACE.kinds()[point.kind]
        assert ranges.layers[0] <= point.layers <= ranges.layers[1]
        assert point.variant in ranges.variants
        assert ranges.learning_rate[0] <= point.learning_rate <= ranges.learning_rate[1]
    assert {point.kind for point in points(found)} == {"transformer", "static"}
    assert found.front[0].point.kind == "static"
    assert len({trial.point.layers for trial in found.front}) >= 3
    assert all(trial.state == "pruned" for trial in found.dropped)
    assert any("is no slower" in trial.reason for trial in found.dropped)


def test_seed_determines_the_points_and_resuming_repeats_none(
    config: StudyConfig, folder: Path
) -> None:
    again = replace(config, storage=f"sqlite:///{folder}/again.db")
    other = replace(config, storage=f"sqlite:///{folder}/other.db", seed=1)
    whole = points(search(evaluate, SPACE, config))
    search(evaluate, SPACE, replace(again, trials=3))
    assert points(search(evaluate, SPACE, again)) == whole
    assert len(set(whole)) == 5
    assert not set(points(search(evaluate, SPACE, replace(other, trials=2)))) & set(whole)


def test_complete_study_is_only_read(config: StudyConfig) -> None:
    found = search(evaluate, SPACE, config)
    assert search(lambda point, report: pytest.fail("no trial is left"), SPACE, config) == found


def test_failed_trials_are_recorded_and_the_search_continues(
    config: StudyConfig, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(point: TrialParams, report: Report) -> Outcome:
        if report.number == 1:
            raise DataError("the training loss is not a number; try a lower --learning-rate.")
        if report.number == 2:
            raise ZeroDivisionError("oh")
        if report.number == 3:
            report(1, float("nan"))
        return evaluate(point, report)

    found = search(broken, SPACE, config)
    assert [(trial.number, trial.reason) for trial in found.failed] == [
        (1, "the training loss is not a number; try a lower --learning-rate."),
        (2, "ZeroDivisionError: oh"),
        (3, "the accuracy after epoch 1 is nan; it must be from 0 to 1."),
    ]
    assert [trial.number for trial in found.finished] == [0, 4], "failed trials count"
    assert [record.message for record in caplog.records] == ["trial 2 of study students failed"]


def test_time_limit_stops_a_trial_which_is_retried(config: StudyConfig) -> None:
    def endless(point: TrialParams, report: Report) -> Outcome:
        for epoch in itertools.count(1):
            time.sleep(0.02)
            report(epoch, 0.9)
        raise AssertionError

    search(evaluate, SPACE, replace(config, trials=1))  # imports and tables cost time only once
    started = time.monotonic()
    found = search(endless, SPACE, replace(config, seconds=2.0))
    assert 2.0 <= time.monotonic() - started < 4
    stopped, waiting = found.dropped
    assert (waiting.number, waiting.state, waiting.point) == (2, "open", stopped.point)
    assert (stopped.number, stopped.state) == (1, "stopped")
    assert stopped.reason.startswith("the time limit was reached after epoch ")
    found = search(evaluate, SPACE, config)
    assert [trial.number for trial in found.finished] == [0, 2, 3, 4, 5]
    assert found.finished[1].point == stopped.point
    assert found.dropped[0].reason.endswith("; retried as trial 2")


def test_locked_database_is_reported_after_wait_s(config: StudyConfig, folder: Path) -> None:
    search(evaluate, SPACE, replace(config, trials=1))
    other = sqlite3.connect(folder / "study.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    started = time.monotonic()
    with pytest.raises(SearchError, match=r"study students in sqlite:.*locked.*Another process"):
        search(evaluate, SPACE, replace(config, wait_s=0.5))
    assert 0.5 <= time.monotonic() - started < 4, "SQLite waits for 5 s by default"
    other.close()
    assert len(search(evaluate, SPACE, config).finished) == 5


def test_study_deleted_during_the_search(config: StudyConfig) -> None:
    def deleting(point: TrialParams, report: Report) -> Outcome:
        if report.number == 1:
            optuna.delete_study(study_name=config.study, storage=config.storage)
        return evaluate(point, report)

    with pytest.raises(SearchError, match="students in .* was deleted during the search"):
        search(deleting, SPACE, config)


def test_study_with_another_space_or_other_objectives(config: StudyConfig) -> None:
    search(evaluate, SPACE, replace(config, trials=1))
    assert SPACE.transformer is not None
    other = Space(replace(SPACE.transformer, layers=(1, 6)), None)
    with pytest.raises(SearchError) as caught:
        search(evaluate, other, config)
    assert "transformer.layers: [1, 4] in the study, [1, 6] now" in str(caught.value)
    assert "static: included in the study" in str(caught.value)
    optuna.create_study(study_name="mine", storage=config.storage, direction="minimize")
    with pytest.raises(SearchError, match="study mine has other objectives"):
        search(evaluate, SPACE, replace(config, study="mine"))


def test_mlflow_database_is_rejected_unchanged(config: StudyConfig, tracking: str) -> None:
    file = Path(tracking.removeprefix("sqlite:///"))
    before = file.read_bytes()
    with pytest.raises(SearchError, match="database of another application, e.g. MLflow"):
        search(evaluate, SPACE, replace(config, storage=tracking))
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("storage", "message"),
    [
        ("study.db", "storage of study students is not a database URL"),
        ("sqlite:////nowhere/study.db", "students in sqlite:.*unable to open.*Check the URL"),
        ("mysql://me:secret@host/studies", r"mysql://me:\*\*\*@host/studies needs a driver"),
    ],
)
def test_storage_that_cannot_be_used(config: StudyConfig, storage: str, message: str) -> None:
    with pytest.raises(SearchError, match=message) as caught:
        search(evaluate, SPACE, replace(config, storage=storage))
    assert "secret" not in str(caught.value)


def test_invalid_config(config: StudyConfig) -> None:
    with pytest.raises(SearchError, match="trials of the search is 0; give at least 1"):
        replace(config, trials=0)


def test_optuna_logging_is_silenced_and_restored(
    config: StudyConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("optuna")
    before = logger.level, logger.propagate, logger.handlers[:]
    search(evaluate, SPACE, replace(config, trials=2))
    assert capfd.readouterr() == ("", "")
    assert (logger.level, logger.propagate, logger.handlers) == before


def test_import_of_the_package_is_light() -> None:
    code = (
        "import sys; import mlflow_pt_deploy.search; "
        "sys.exit(any(name in sys.modules for name in ('optuna', 'sqlalchemy', 'torch', 'mlflow')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
