"""The stage `search`: trials are runs, the Pareto front is logged, chosen students are trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from mlflow_pt_deploy import tracking as runs
from mlflow_pt_deploy.cli import main
from mlflow_pt_deploy.config import Options
from mlflow_pt_deploy.data import Splits
from mlflow_pt_deploy.errors import SearchError
from mlflow_pt_deploy.models import load_classifier
from mlflow_pt_deploy.pipeline.search_stage import SearchResult, default_space, search_students
from mlflow_pt_deploy.pipeline.trial_objective import Evaluator
from mlflow_pt_deploy.search import STATIC, TRANSFORMER, Outcome, Report, TrialParams


def _trials(parent: str) -> list[Run]:
    client = MlflowClient()
    return client.search_runs(
        [client.get_run(parent).info.experiment_id],
        f"tags.mlflow.parentRunId = '{parent}' and tags.`{runs.STAGE_TAG}` = 'trial'",
    )


def test_a_run_with_a_search_promotes_a_champion(
    tracking: str, tiny_data: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (
        f"--data {tiny_data} --teacher {tiny_model} --name found --epochs 0 --trials 1 "
        "--kinds static --variants numpy --seconds 0.1 --retain 0.1 --json"
    )
    assert main(["run", *flags.split()]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    document = json.loads(lines[-1])
    # The requested variant is for static students; of the teacher there is only the baseline.
    assert {"static-numpy-fp32", "teacher-eager-fp32"} == {
        row["variant"] for row in document["variants"]
    }
    assert document["promoted"]["uri"] == "models:/found@champion"
    assert document["seconds"]["search"] > 0
    assert sum(line.startswith("search: trial") for line in lines) == 1

    search = runs.latest_child_run(document["run_id"], "search")
    assert search is not None
    trials = _trials(search.info.run_id)
    assert len(trials) == 1
    for trial in trials:
        assert trial.info.status == "FINISHED"
        assert trial.data.params["kind"] == "static"
        assert 0 < trial.data.metrics["accuracy"] <= 1
        assert trial.data.metrics["latency_p50_ms"] > 0
    client = MlflowClient()
    files = {file.path for file in client.list_artifacts(search.info.run_id)}
    assert {"pareto.png", "report.md", "trials.json"} <= files
    assert "finished trials" in search.data.tags["mlflow.note.content"]
    # The chosen student was trained again,
    student = runs.latest_child_run(search.info.run_id, "distill-static")
    assert student is not None
    chosen = json.loads(client.get_run(student.info.run_id).data.tags[runs.OPTIONS_TAG])
    taken = [t for t in trials if float(t.data.params["temperature"]) == chosen["temperature"]]
    assert len(taken) == 1
    # from the same initial weights, with the same result.
    losses = [
        client.get_metric_history(run.info.run_id, "validation_accuracy")
        for run in (taken[0], student)
    ]
    assert [m.value for m in losses[0]] == [m.value for m in losses[1]]


def _fake(self: Evaluator, point: TrialParams, report: Report) -> Outcome:
    from mlflow_pt_deploy.pipeline.trial_objective import _trial_run

    with _trial_run(report.number, point):
        if report.number == 1:
            raise SearchError("invalid student")
        report(1, 0.5)
    return Outcome(0.5 + 0.01 * report.number, 1.0 + report.number)


@pytest.fixture
def fake_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Evaluator, "__call__", _fake)


def _searched(tiny_splits: Splits, tiny_model: Path, trials: int, resume: str = "") -> SearchResult:
    options = Options(
        teacher=str(tiny_model), trials=trials, kinds="transformer", retain=0.5, resume=resume
    )
    return search_students(options, tiny_splits)


def test_a_search_continues_after_a_failed_trial(
    tracking: str, fake_trials: None, tiny_splits: Splits, tiny_model: Path
) -> None:
    done = _searched(tiny_splits, tiny_model, 3)
    assert [trial.number for trial in done.found.finished] == [0, 2]
    assert [trial.reason for trial in done.found.failed] == ["invalid student"]
    by_number = {run.data.tags["pt_deploy.trial"]: run for run in _trials(done.run_id)}
    assert by_number["1"].info.status == "FAILED"
    assert by_number["1"].data.tags[runs.REASON_TAG] == "invalid student"
    assert done.students[0].model.startswith("runs:/")


def test_a_killed_search_is_resumed(
    tracking: str, fake_trials: None, tiny_splits: Splits, tiny_model: Path
) -> None:
    first = _searched(tiny_splits, tiny_model, 2)
    client = MlflowClient()
    experiment = client.get_run(first.run_id).info.experiment_id
    left = client.create_run(experiment, tags={"mlflow.parentRunId": first.run_id})
    again = _searched(tiny_splits, tiny_model, 4, resume=first.run_id)
    assert again.run_id == first.run_id
    assert len(again.found.finished) == 3
    assert client.get_run(left.info.run_id).info.status == "KILLED"
    # The same trial is chosen again, so nothing is trained.
    third = _searched(tiny_splits, tiny_model, 4, resume=first.run_id)
    assert third.students == again.students


def test_the_default_space_depends_on_the_teacher(tiny_model: Path) -> None:
    teacher = load_classifier(str(tiny_model))
    space = default_space(teacher, "transformer")
    assert space.static is None
    assert space.transformer is not None
    assert space.transformer.layers == (1, 1)
    assert space.transformer.learning_rate == TRANSFORMER.learning_rate
    teacher.network.config.hidden_size = 768
    wide = default_space(teacher, "static, transformer")
    assert wide.static == STATIC
    assert wide.transformer is not None
    assert wide.transformer.learning_rate < TRANSFORMER.learning_rate


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kinds", "quantum"], "kinds is 'quantum'; choose from transformer, static"),
        (["--trials", "0"], "trials of the search is 0; give at least 1"),
        (["--storage", "nowhere"], "is not a database URL"),
    ],
)
def test_a_user_error_is_one_line(
    tracking: str,
    tiny_data: Path,
    tiny_model: Path,
    flags: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["search", "--teacher", str(tiny_model), "--data", str(tiny_data)]
    assert main([*command, *flags]) == 1
    assert message in capsys.readouterr().err


def test_a_password_is_not_logged() -> None:
    options = Options(storage="postgresql://me:secret@host/db")
    assert "secret" not in options.to_json()
