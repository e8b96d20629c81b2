"""A search on real SQLite files: what it finds, keeps to and refuses."""

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
from tiny_search import SPACE, evaluate, fast_folder, numbers, points, worth

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
def plan(folder: Path) -> StudyConfig:
    return StudyConfig("students", f"sqlite:///{folder}/study.db", trials=5, heartbeat_s=0.1)


def test_a_search_finds_the_front_and_keeps_to_the_space(plan: StudyConfig) -> None:
    seen: list[CompletedTrial | FailedTrial] = []
    found = search(evaluate, SPACE, replace(plan, trials=20), on_trial=seen.append)
    assert numbers(found) == [record.number for record in seen] == list(range(20))
    for trial in found.finished:
        assert trial.outcome == worth(trial.point)
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


def test_the_seed_decides_and_a_resumed_search_repeats_nothing(
    plan: StudyConfig, folder: Path
) -> None:
    again = replace(plan, storage=f"sqlite:///{folder}/again.db")
    other = replace(plan, storage=f"sqlite:///{folder}/other.db", seed=1)
    whole = points(search(evaluate, SPACE, plan))
    search(evaluate, SPACE, replace(again, trials=3))
    assert points(search(evaluate, SPACE, again)) == whole
    assert len(set(whole)) == 5
    assert not set(points(search(evaluate, SPACE, replace(other, trials=2)))) & set(whole)


def test_a_search_that_has_its_trials_only_reads(plan: StudyConfig) -> None:
    found = search(evaluate, SPACE, plan)
    assert search(lambda point, report: pytest.fail("nothing is left"), SPACE, plan) == found


def test_a_trial_that_fails_is_recorded_and_the_search_goes_on(
    plan: StudyConfig, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(point: TrialParams, report: Report) -> Outcome:
        if report.number == 1:
            raise DataError("the training loss is not a number; try a lower --learning-rate.")
        if report.number == 2:
            raise ZeroDivisionError("oh")
        if report.number == 3:
            report(1, float("nan"))
        return evaluate(point, report)

    found = search(broken, SPACE, plan)
    assert [(trial.number, trial.reason) for trial in found.failed] == [
        (1, "the training loss is not a number; try a lower --learning-rate."),
        (2, "ZeroDivisionError: oh"),
        (3, "the accuracy after epoch 1 is nan, which is no share."),
    ]
    assert [trial.number for trial in found.finished] == [0, 4], "a failed one counts"
    assert [record.message for record in caplog.records] == ["trial 2 of study students failed"]


def test_time_is_kept_and_a_trial_cut_short_tried_again(plan: StudyConfig) -> None:
    def endless(point: TrialParams, report: Report) -> Outcome:
        if report.number == 0:
            return evaluate(point, report)
        for epoch in itertools.count(1):
            time.sleep(0.02)
            report(epoch, 0.9)
        raise AssertionError

    started = time.monotonic()
    found = search(endless, SPACE, replace(plan, seconds=1.0))
    assert 1.0 <= time.monotonic() - started < 3
    late, waiting = found.dropped
    assert (waiting.number, waiting.state, waiting.point) == (2, "open", late.point)
    assert (late.number, late.state) == (1, "stopped")
    assert late.reason.startswith("the time was over after epoch ")
    found = search(evaluate, SPACE, plan)
    assert [trial.number for trial in found.finished] == [0, 2, 3, 4, 5]
    assert found.finished[1].point == late.point
    assert found.dropped[0].reason.endswith("; tried again as trial 2")


def test_a_locked_file_is_waited_for_and_then_named(plan: StudyConfig, folder: Path) -> None:
    search(evaluate, SPACE, replace(plan, trials=1))
    other = sqlite3.connect(folder / "study.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    started = time.monotonic()
    with pytest.raises(SearchError, match=r"study students in sqlite:.*locked.*Another process"):
        search(evaluate, SPACE, replace(plan, wait_s=0.5))
    assert 0.5 <= time.monotonic() - started < 4, "SQLite alone would wait for 5 s"
    other.close()
    assert len(search(evaluate, SPACE, plan).finished) == 5


def test_a_study_deleted_in_the_middle(plan: StudyConfig) -> None:
    def deleting(point: TrialParams, report: Report) -> Outcome:
        if report.number == 1:
            optuna.delete_study(study_name=plan.study, storage=plan.storage)
        return evaluate(point, report)

    with pytest.raises(SearchError, match="students in .* was deleted while it was searched"):
        search(deleting, SPACE, plan)


def test_another_space_or_other_objectives_are_refused(plan: StudyConfig) -> None:
    search(evaluate, SPACE, replace(plan, trials=1))
    assert SPACE.transformer is not None
    other = Space(replace(SPACE.transformer, layers=(1, 6)), None)
    with pytest.raises(SearchError) as caught:
        search(evaluate, other, plan)
    assert "transformer.layers: [1, 4] in it, [1, 6] now" in str(caught.value)
    assert "static: has been tried in it" in str(caught.value)
    optuna.create_study(study_name="mine", storage=plan.storage, direction="minimize")
    with pytest.raises(SearchError, match="study mine has other objectives"):
        search(evaluate, SPACE, replace(plan, study="mine"))


def test_mlflows_database_is_refused_and_left_alone(plan: StudyConfig, tracking: str) -> None:
    file = Path(tracking.removeprefix("sqlite:///"))
    before = file.read_bytes()
    with pytest.raises(SearchError, match="database of something else, MLflow for example"):
        search(evaluate, SPACE, replace(plan, storage=tracking))
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("storage", "message"),
    [
        ("study.db", "no database address"),
        ("sqlite:////nowhere/study.db", "students in sqlite:.*unable to open.*Check the address"),
        ("mysql://me:secret@host/studies", r"mysql://me:\*\*\*@host/studies needs a driver"),
    ],
)
def test_an_address_that_does_not_work(plan: StudyConfig, storage: str, message: str) -> None:
    with pytest.raises(SearchError, match=message) as caught:
        search(evaluate, SPACE, replace(plan, storage=storage))
    assert "secret" not in str(caught.value)


def test_a_plan_that_makes_no_sense(plan: StudyConfig) -> None:
    with pytest.raises(SearchError, match="trials of the search is 0; give at least 1"):
        replace(plan, trials=0)


def test_optuna_is_quiet_and_left_as_it_was(
    plan: StudyConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("optuna")
    before = logger.level, logger.propagate, logger.handlers[:]
    search(evaluate, SPACE, replace(plan, trials=2))
    assert capfd.readouterr() == ("", "")
    assert (logger.level, logger.propagate, logger.handlers) == before


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    code = (
        "import sys; import mlflow_pt_deploy.search; "
        "sys.exit(any(name in sys.modules for name in ('optuna', 'sqlalchemy', 'torch', 'mlflow')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
