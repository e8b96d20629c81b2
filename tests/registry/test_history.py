"""Rollback, and the history of a registered model."""

from __future__ import annotations

import getpass

import mlflow
import pytest
from mlflow import MlflowClient
from tiny.artifact import SAVED

from mlflow_pt_deploy import flavor
from mlflow_pt_deploy.errors import TrackingError
from mlflow_pt_deploy.registry import history
from mlflow_pt_deploy.registry.history import Event, append_event, read_history
from mlflow_pt_deploy.registry.promotion import Candidate, promote, rollback


def promoted(name: str, *texts: str) -> None:
    """Register one version per text and promote each."""
    for text in texts:
        with mlflow.start_run():
            uri = f"models:/{flavor.log_model(SAVED / 'variant', text).model_id}"
        promote(Candidate(uri, text, {"accuracy": "0.9"}, {"accuracy": 0.9}), name, text)


def test_the_history_says_who_when_from_to_why_and_measured(
    tracking: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    promoted("my shop", "the first", "the second")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
    assert rollback("my shop").previous == "2"
    found = read_history("my shop")
    assert [(e.action, e.before, e.after) for e in found.events] == [
        ("promote", None, "1"),
        ("promote", "1", "2"),
        ("rollback", "2", "1"),
    ]
    assert [event.who for event in found.events] == [getpass.getuser()] * 2 + ["ada"]
    assert found.events[1].why == "the second"
    assert found.events[2].why == "rollback from version 2"
    assert all(event.measured == {"accuracy": 0.9} for event in found.events)
    assert not found.moved_by_hand
    table = found.table().splitlines()
    assert table[0].split() == [
        *("when", "who", "what", "version", "from", "accuracy", "latency_p50_ms", "speedup")
    ]
    assert table[1].split()[1:] == ["ada", "rollback", "1", "2", "0.9", "-", "-"]
    assert table[2] == "    rollback from version 2"
    MlflowClient().set_registered_model_alias("my shop", "champion", "2")
    assert read_history("my shop").moved_by_hand


def test_rollback_goes_back_and_forth(tracking: str) -> None:
    promoted("shop", "a", "b", "c")
    assert rollback("shop").version == "2"
    assert rollback("shop").version == "3"
    assert rollback("shop", "1").version == "1"
    assert rollback("shop").version == "3"


def test_a_rollback_without_a_target_is_an_error(tracking: str) -> None:
    promoted("shop", "a")
    with pytest.raises(TrackingError, match="nothing to go back to. Name one with --to"):
        rollback("shop")
    with pytest.raises(TrackingError, match="version 1 of shop is the champion already"):
        rollback("shop", "1")
    with pytest.raises(TrackingError, match="shop was not rolled back: .*7"):
        rollback("shop", "7")
    with pytest.raises(TrackingError, match="none was not rolled back"):
        rollback("none")
    for name in ("a/b", "a:b", " "):
        with pytest.raises(TrackingError, match="cannot be the name of a registered model"):
            rollback(name)


def test_a_deleted_version_behind_previous(tracking: str) -> None:
    promoted("shop", "a", "b")
    MlflowClient().delete_model_version("shop", "1")  # MLflow removes its aliases too
    with pytest.raises(TrackingError, match="nothing to go back to"):
        rollback("shop")
    assert read_history("shop").champion == "2"


def test_a_long_history_keeps_the_newest(tracking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "_MAX_EVENTS", 3)
    client = MlflowClient()
    client.create_registered_model("shop")
    for number in range(5):
        append_event(client, "shop", Event("promote", None, str(number), "x" * 9999, "me", "now"))
    client.set_registered_model_tag("shop", "pt_deploy.event.zzz", "by hand")
    found = read_history("shop").events
    assert [event.after for event in found] == ["2", "3", "4"]
    assert len(found[0].why) == 400
    with pytest.raises(TrackingError, match="the history of none cannot be read"):
        read_history("none")


def test_a_model_without_promotions(tracking: str) -> None:
    MlflowClient().create_registered_model("shop")
    found = read_history("shop")
    assert found.table() == "No promotion by pt-deploy."
    assert not found.moved_by_hand
