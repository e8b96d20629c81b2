"""Feedback: what is taken, what is refused, and that answering never waits for it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from tiny.server import running
from tiny.serving import save_tiny

from mlflow_pt_deploy.errors import RequestError
from mlflow_pt_deploy.registry.addresses import source
from mlflow_pt_deploy.serving.app import Application
from mlflow_pt_deploy.serving.http.auth import TokenAuth
from mlflow_pt_deploy.serving.lifecycle.served_model import ServedModel
from mlflow_pt_deploy.serving.monitoring import feedback as module
from mlflow_pt_deploy.serving.monitoring.feedback import FeedbackCollector, parse_feedback
from mlflow_pt_deploy.serving.monitoring.feedback_store import FILE, FeedbackStore, create_store
from mlflow_pt_deploy.serving.observability.prometheus import PrometheusMetrics

SECRET = "zanzibar"
TOKEN = {"Authorization": f"Bearer {'t' * 16}"}
RED = '{"label": "red", "score": 0.9}'


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    model = ServedModel(
        "tiny", source(str(save_tiny(tmp_path_factory.mktemp("feedback") / "tiny")))
    )
    model.open()
    return model


@pytest.fixture
def collector(model: ServedModel, tmp_path: Path) -> FeedbackCollector:
    create_store(tmp_path)
    metrics = PrometheusMetrics()
    return FeedbackCollector({"tiny": model}, FeedbackStore(tmp_path, 1000), metrics)


@pytest.fixture
def url(model: ServedModel, collector: FeedbackCollector) -> Iterator[str]:
    auth = TokenAuth(("t" * 16).encode().split(), ("a" * 16).encode().split())
    application = Application(
        {"tiny": model}, auth=auth, metrics=collector._metrics, feedback=collector
    )
    with running(application) as url:
        yield url


def label(model: ServedModel) -> str:
    assert model.current is not None
    return model.current.label


def post(url: str, body: Any, **headers: str) -> requests.Response:
    data = body if isinstance(body, bytes) else json.dumps(body)
    return requests.post(f"{url}/feedback", data=data, headers=TOKEN | headers, timeout=10)


def score(url: str, request_id: str, *texts: str, top_k: int = 1) -> None:
    headers = TOKEN | {"X-Request-Id": request_id}
    body = {"inputs": texts, "params": {"top_k": top_k}}
    answer = requests.post(f"{url}/invocations", json=body, headers=headers, timeout=10)
    assert answer.status_code == 200


def test_feedback_becomes_live_accuracy(
    url: str, collector: FeedbackCollector, model: ServedModel
) -> None:
    score(url, "one", "red", top_k=3)
    score(url, "two", "green", "blue")
    given = [
        {"request_id": "one", "label": "red"},
        {"request_id": "two", "row": 0, "label": "red"},
        {"request_id": "two", "row": 1, "label": "blue"},
        {"request_id": "three", "row": 0, "label": "blue"},
    ]
    answer = post(url, {"feedback": given})
    assert answer.status_code == 200
    assert answer.json()["taken"] == 3
    assert [(each["index"], each["status"]) for each in answer.json()["not_taken"]] == [(3, 404)]
    admin = {"Authorization": f"Bearer {'a' * 16}"}
    status = requests.get(f"{url}/model", headers=admin, timeout=10).json()
    found = {"judged_rows": 3, "accuracy": 0.6667, "accuracy_low": 0.2077, "accuracy_high": 0.9385}
    assert status["feedback"] == {label(model): found}
    collector.lead(collector.counts())
    text = requests.get(f"{url}/metrics", headers=admin, timeout=10).text
    series = f'{{model="tiny",version="{label(model)}"}}'
    assert f"pt_deploy_judged_rows{series} 3.0" in text
    assert f"pt_deploy_live_accuracy{series} 0.666" in text
    assert f"pt_deploy_live_accuracy_low{series} 0.207" in text


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "the body is not valid JSON"),
        ([], 'the body must be {"feedback": '),
        ({"feedback": []}, 'the body must be {"feedback": '),
        ({"feedback": {}, "more": SECRET}, 'the body must be {"feedback": '),
        ({"feedback": [SECRET]}, "item 0 must be an object with 'request_id'"),
        ({"feedback": [{"request_id": "a", "label": "b", SECRET: 1}]}, "item 0 must be an object"),
        ({"feedback": [{"label": SECRET}]}, "item 0: 'request_id' must be a text of 1 to 1000"),
        ({"feedback": [{"request_id": "a", "label": 3}]}, "item 0: 'label' must be a text"),
        ({"feedback": [{"request_id": "a", "label": "\ud800"}]}, "item 0: 'label' must be a text"),
        ({"feedback": [{"request_id": "a", "label": SECRET * 999}]}, "'label' must be a text"),
        (
            {"feedback": [{"request_id": "a", "label": "red", "row": -1}]},
            "item 0: 'row' must be a whole number from 0",
        ),
        ({"feedback": [{"request_id": "a", "label": "red", "row": True}]}, "'row' must be a whole"),
        (
            {"feedback": [{"request_id": "a", "label": "red"}] * 1001},
            "'feedback' has 1001 items; one request may have 1000",
        ),
        ({"feedback": [{"request_id": "known", "label": SECRET}]}, "'label' is not a label of the"),
    ],
    ids=str,
)
def test_invalid_feedback_is_refused(
    collector: FeedbackCollector, model: ServedModel, body: Any, message: str
) -> None:
    collector.remember("known", "tiny", label(model), [RED])
    answer = collector.take(body if isinstance(body, bytes) else json.dumps(body).encode())
    assert answer.status == 400
    assert message in json.loads(answer.body)["message"]
    assert SECRET not in answer.body.decode()


def test_feedback_needs_a_token_and_post(url: str) -> None:
    assert post(url, {}, Authorization="Bearer wrong").status_code == 401
    wrong = requests.get(f"{url}/feedback", headers=TOKEN, timeout=10)
    assert (wrong.status_code, wrong.headers["Allow"]) == (405, "POST")
    assert post(url, b"x" * (5 * 2**20)).status_code == 413


def test_feedback_that_is_off_says_how_to_turn_it_on(model: ServedModel) -> None:
    with running(Application({"tiny": model})) as url:
        answer = post(url, {})
        assert answer.status_code == 404
        assert "--feedback-rows" in answer.json()["message"]
        assert "feedback" not in requests.get(f"{url}/model", timeout=10).json()


def test_answers_beyond_the_queue_are_dropped_and_counted(
    collector: FeedbackCollector, model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_QUEUED_ROWS", 3)
    for number in range(3):
        collector.remember(f"id-{number}", "tiny", label(model), [RED, RED])
    collector.follow()
    collector.remember("later", "tiny", label(model), [RED])
    collector.remember("unknown", "tiny", "a version that is not counted", [RED])
    collector.follow()
    items = [
        {"request_id": name, "row": 0, "label": "red"}
        for name in ("id-0", "id-1", "later", "unknown")
    ]
    answer = json.loads(collector.take(json.dumps({"feedback": items}).encode()).body)
    assert [each["index"] for each in answer["not_taken"]] == [1, 3]
    text = collector._metrics.expose()
    assert text is not None and b"pt_deploy_feedback_dropped_rows_total 4.0" in text


def test_a_file_that_is_gone_fails_no_request(
    collector: FeedbackCollector,
    model: ServedModel,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / FILE).unlink()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            collector.remember("a", "tiny", label(model), [RED])
            collector.follow()
            assert collector.counts() == {}
    assert len(caplog.records) == 1
    item = {"request_id": "a", "label": "red"}
    answer = collector.take(json.dumps({"feedback": [item]}).encode())
    assert (answer.status, answer.error_code) == (503, "TEMPORARILY_UNAVAILABLE")


def test_the_largest_request_is_taken() -> None:
    items = [{"request_id": "a", "label": "red"}] * module.MAX_ITEMS
    assert len(parse_feedback({"feedback": items})) == module.MAX_ITEMS
    with pytest.raises(RequestError, match="Send several smaller requests"):
        parse_feedback({"feedback": [*items, *items]})
