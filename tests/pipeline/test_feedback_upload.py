"""A file of labels, sent to a running server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny.server import free_port, running
from tiny.serving import save_tiny

from mlflow_pt_deploy.cli import main
from mlflow_pt_deploy.errors import DataError, ServingError
from mlflow_pt_deploy.pipeline import feedback_upload
from mlflow_pt_deploy.pipeline.feedback_upload import Sent, send_feedback
from mlflow_pt_deploy.registry.addresses import source
from mlflow_pt_deploy.serving.app import Application
from mlflow_pt_deploy.serving.http.auth import TokenAuth
from mlflow_pt_deploy.serving.lifecycle.served_model import ServedModel
from mlflow_pt_deploy.serving.monitoring.feedback import FeedbackCollector
from mlflow_pt_deploy.serving.monitoring.feedback_store import (
    Answers,
    FeedbackStore,
    Judged,
    create_store,
)
from mlflow_pt_deploy.serving.observability.metrics import Metrics

TOKEN = "t" * 16


@pytest.fixture
def store(tmp_path: Path) -> FeedbackStore:
    """Thirty answers of one row, and one of two rows."""
    create_store(tmp_path)
    store = FeedbackStore(tmp_path, 1000)
    rows = [*([["red"]] * 30), ["red", "blue"]]
    store.add(
        Answers(f"id-{at}", "tiny", "1", ("red", "green", "blue"), 0.0, answered)
        for at, answered in enumerate(rows)
    )
    return store


@pytest.fixture
def url(store: FeedbackStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("PT_DEPLOY_TOKEN", TOKEN)
    monkeypatch.setattr(feedback_upload, "BATCH", 10)
    model = ServedModel("tiny", source(str(save_tiny(tmp_path / "tiny"))))
    collector = FeedbackCollector({"tiny": model}, store, Metrics())
    auth = TokenAuth((TOKEN.encode(),))
    with running(Application({"tiny": model}, auth=auth, feedback=collector)) as url:
        yield url


def test_a_csv_file_is_sent_in_batches(url: str, store: FeedbackStore, tmp_path: Path) -> None:
    file = tmp_path / "labels.csv"
    lines = [f"id-{at},,{'red' if at < 20 else 'blue'}" for at in range(30)]
    file.write_text("\n".join(["request_id,row,label", *lines, "id-30,1,blue"]))
    assert send_feedback(str(file), url) == Sent(31, 31, 0, 0, [])
    assert store.judged() == {
        ("tiny", "1"): [
            Judged("blue", "blue", 1),
            Judged("red", "blue", 10),
            Judged("red", "red", 20),
        ]
    }


def test_invalid_labels_are_named_and_the_others_are_taken(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "labels.jsonl"
    given: list[object] = [{"request_id": f"id-{at}", "label": "red"} for at in range(25)]
    given[3] = {"request_id": "id-3", "label": "pink"}
    given[7] = {"request_id": "id-30", "label": "red"}
    given[9] = {"request_id": "id-9", "row": "first", "label": "red"}
    given[11] = {"label": "red"}
    given[12] = {"request_id": "id-12", "label": None}
    given[13] = {"request_id": "somebody else's", "label": "red"}
    given[14] = []
    file.write_text("\n".join(map(json.dumps, given)))
    assert main(["feedback", str(file), "--url", url, "--json"]) == 4
    out = capsys.readouterr().out.splitlines()
    assert out[0].endswith("took 18 of 25 labels")
    assert "1 are of rows that the server does not remember" in out[1]
    shown = [line.strip() for line in out[3:-1]]
    assert shown[0] == "row 10: row is not a whole number"
    assert "row 4: 'label' is not a label of the model that answered" in shown
    assert len(shown) == 5
    document = json.loads(out[-1])
    assert {key: document[key] for key in ("rows", "taken", "unknown", "rejected")} == {
        "rows": 25,
        "taken": 18,
        "unknown": 1,
        "rejected": 6,
    }


def test_a_file_without_the_columns_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "labels.csv"
    file.write_text("id,label\n1,red\n")
    with pytest.raises(DataError, match="labels.csv has no column request_id. Give request_id,"):
        send_feedback(str(file), "http://127.0.0.1:1")


def test_a_server_that_takes_none_is_named(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "labels.csv"
    file.write_text("request_id,label\nid-1,red\n")
    for wrong in (f"http://127.0.0.1:{free_port()}", "127.0.0.1"):
        with pytest.raises(ServingError, match="does not answer as pt-deploy serve does"):
            send_feedback(str(file), wrong)
    monkeypatch.setenv("PT_DEPLOY_TOKEN", "w" * 16)
    with pytest.raises(ServingError, match="took no feedback: send a token"):
        send_feedback(str(file), url)
    model = ServedModel("tiny", source("tiny"))
    with (
        running(Application({"tiny": model})) as off,
        pytest.raises(ServingError, match="took no feedback: feedback is off; start the server"),
    ):
        send_feedback(str(file), off)
