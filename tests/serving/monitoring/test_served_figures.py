"""What was served, written to a real registry beside what was promised."""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from tiny.artifact import SAVED

from mlflow_pt_deploy import flavor
from mlflow_pt_deploy.commands import registry as commands
from mlflow_pt_deploy.registry.addresses import ResolvedVersion, source
from mlflow_pt_deploy.registry.history import read_history
from mlflow_pt_deploy.registry.profile_tags import SERVED_TAG
from mlflow_pt_deploy.registry.promotion import Candidate, promote
from mlflow_pt_deploy.registry.served_figures import TABLE
from mlflow_pt_deploy.serving.lifecycle.served_model import ServedModel
from mlflow_pt_deploy.serving.lifecycle.version_records import CountedVersion
from mlflow_pt_deploy.serving.model.version_counts import VersionCounts
from mlflow_pt_deploy.serving.monitoring import served_figures as module
from mlflow_pt_deploy.serving.monitoring.feedback_store import (
    Answers,
    Feedback,
    FeedbackStore,
    create_store,
)
from mlflow_pt_deploy.serving.monitoring.served_figures import ServedFigures, figures

SINCE = "2026-11-28T09:00:00+00:00"


def counts(requests: int = 10, **more: int) -> VersionCounts:
    found = VersionCounts(labels=[0, 0], **more)
    for _ in range(requests):
        found.count_response(200, 0.001)
        found.count_rows([(1, 0.97)], [[[5, 6, 7]]])
    return found


def test_figures_are_left_out_where_there_are_none() -> None:
    assert figures(VersionCounts(requests=3, errors=3)) == {"requests": 3, "errors": 3, "rows": 0}
    assert figures(counts(compared=8, disagreed=2, judged=100, correct=90), 12.3456) == {
        "requests": 10,
        "errors": 0,
        "rows": 10,
        "rows_per_s": 12.35,
        "latency_p50_ms": 1.137,
        "latency_p99_ms": 1.137,
        "compared_rows": 8,
        "agreement": 0.75,
        "judged_rows": 100,
        "accuracy": 0.9,
        "accuracy_low": 0.8256,
        "accuracy_high": 0.9448,
    }
    assert figures(VersionCounts(requests=12345678))["requests"] == 12345678


@pytest.fixture
def shop(tracking: str) -> ServedModel:
    """A model that serves the promoted version 1 of the registered model shop."""
    with mlflow.start_run():
        uri = f"models:/{flavor.log_model(SAVED / 'variant', 'first').model_id}"
    tags = {"accuracy": "0.9", "latency_p50_ms": "0.5"}
    promote(Candidate(uri, "first", tags, {"accuracy": 0.9}), "shop", "the first")
    model = ServedModel("shop", source("models:/shop@champion"))
    model.counted = {
        "1": CountedVersion(ResolvedVersion("models:/shop/1", "shop", "1"), ("no", "yes")),
        "2": CountedVersion(ResolvedVersion("folder"), ("no", "yes")),
    }
    return model


def tags() -> dict[str, str]:
    return dict(MlflowClient().get_model_version("shop", "1").tags)


def lead(duty: ServedFigures, found: VersionCounts) -> None:
    """One turn, whose writing ends before this returns."""
    duty.lead({"shop": {"1": found, "2": found, "forgotten": found}})
    if duty._thread is not None:
        duty._thread.join()


def test_tags_metrics_and_table_stand_beside_the_promise(
    shop: ServedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    create_store(tmp_path)
    store = FeedbackStore(tmp_path, 100)
    store.add([Answers("a", "shop", "1", ("no", "yes"), 0.0, ["yes"])])
    store.judge([Feedback("a", 0, "no")])
    duty = ServedFigures({"shop": shop}, 1e-9, SINCE, store)
    duty.follow()
    lead(duty, VersionCounts())
    assert "served.requests" not in tags(), "nothing was asked"
    lead(duty, counts(judged=10, correct=9))
    found = tags()
    assert found["accuracy"] == "0.9"
    assert (found["served.requests"], found["served.errors"]) == ("10", "0")
    assert (found["served.accuracy"], found["served.judged_rows"]) == ("0.9", "10")
    assert (found["served.latency_p50_ms"], found["served.since"]) == ("1.137", SINCE)
    assert found["served.host"] and "cores a replica" in found["served.machine"]
    assert json.loads(found[SERVED_TAG])["rows"] == 10

    client = MlflowClient()
    version = client.get_model_version("shop", "1")
    run = client.get_run(version.run_id)
    assert run.data.metrics["served_requests"] == 10
    assert run.data.metrics["served_accuracy"] == 0.9
    table = mlflow.artifacts.load_dict(f"runs:/{version.run_id}/{TABLE}")
    assert table == {"columns": ["answered", "sent", "rows"], "data": [["yes", "no", 1]]}

    lead(duty, counts(11, judged=10, correct=9))
    assert tags()["served.requests"] == "11"
    history_of = partial(client.get_metric_history, version.run_id, "served_requests")
    assert len(history_of()) == 1, "a point costs the database more than a tag"
    duty.close({"shop": {"1": counts(11, judged=10, correct=9)}})
    assert [point.value for point in history_of()] == [10, 11]

    history = read_history("shop")
    lines = history.served_table().splitlines()
    assert lines[1].split() == ["1", "promised", "0.9", "0.5", "-", "-", "-", "-", "-"]
    assert lines[2].split()[:4] == ["served", "0.9", "[0.5958,", "0.9821]"]
    document = commands.history(type("Parsed", (), {"name": "shop"})())  # type: ignore[arg-type]
    assert document["served"]["1"]["requests"] == "11"
    assert "promised" in capsys.readouterr().out


def test_it_is_written_when_something_changed_and_at_the_end(shop: ServedModel) -> None:
    duty = ServedFigures({"shop": shop}, 3600, SINCE)
    for _ in range(3):
        lead(duty, counts())
    assert "served.requests" not in tags(), "the time has not come"
    duty.close({"shop": {"1": counts(compared=4, disagreed=1)}})
    until = tags()["served.until"]
    assert tags()["served.agreement"] == "0.75"
    duty.close({"shop": {"1": counts(compared=4, disagreed=1)}})
    assert tags()["served.until"] == until
    ServedFigures({"shop": shop}, 3600, SINCE).close({"shop": {"1": counts(3)}})
    assert "served.agreement" not in tags(), "of an earlier server"
    assert tags()["served.requests"] == "3"


@pytest.fixture
def refuse(tracking: str) -> Callable[[bool], None]:
    """Lets the registry's database refuse tags of versions, or take them again."""

    def switch(on: bool) -> None:
        with closing(sqlite3.connect(tracking.removeprefix("sqlite:///"))) as connection:
            connection.execute(
                "CREATE TRIGGER refusing BEFORE INSERT ON model_version_tags "
                "BEGIN SELECT RAISE(ABORT, 'read only'); END"
                if on
                else "DROP TRIGGER refusing"
            )

    return switch


def test_a_registry_that_refuses_is_logged_once_and_tried_again(
    shop: ServedModel, refuse: Callable[[bool], None], caplog: pytest.LogCaptureFixture
) -> None:
    duty = ServedFigures({"shop": shop}, 1e-9, SINCE)
    refuse(True)
    with caplog.at_level(logging.WARNING, module.__name__):
        for _ in range(3):
            lead(duty, counts())
    (record,) = [each for each in caplog.records if each.name == module.__name__]
    assert "shop: what version 1 served cannot be written" in record.getMessage()
    refuse(False)
    lead(duty, counts())
    assert tags()["served.requests"] == "10"
