"""Feedback and served figures of a whole server: two workers, one of them killed."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from mlflow import MlflowClient
from tiny.registry import register_tiny
from tiny.server import START_S, Served, started, until

if not hasattr(socket, "SO_REUSEPORT"):
    pytest.skip("needs SO_REUSEPORT", allow_module_level=True)


@pytest.fixture
def client(tracking: str, tmp_path: Path) -> MlflowClient:
    client = MlflowClient()
    register_tiny(client, tmp_path, {})
    return client


def retried(call: Callable[[], requests.Response]) -> requests.Response:
    for _ in range(100):
        try:
            return call()
        except requests.ConnectionError:  # the kernel had given it to a worker that was ending
            continue
    return call()


def score(url: str, request_id: str) -> str:
    headers = {"X-Request-Id": request_id}
    body = {"inputs": ["red", "blue"]}
    answer = retried(
        lambda: requests.post(f"{url}/invocations", json=body, headers=headers, timeout=60)
    )
    assert answer.status_code == 200
    return request_id


def send(url: str, ids: list[str], label: str) -> dict[str, Any]:
    items = [{"request_id": name, "row": 1, "label": label} for name in ids]
    answer = retried(lambda: requests.post(f"{url}/feedback", json={"feedback": items}, timeout=60))
    assert answer.status_code == 200
    found: dict[str, Any] = answer.json()
    return found


def model(url: str) -> dict[str, Any]:
    found: dict[str, Any] = retried(lambda: requests.get(f"{url}/model", timeout=60)).json()
    return found


def pids(url: str) -> list[int]:
    return [each["pid"] for each in model(url)["replicas"]]


def tags(client: MlflowClient) -> dict[str, str]:
    return dict(client.get_model_version("tiny", "1").tags)


def check_feedback(served: Served, client: MlflowClient) -> None:
    with ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(lambda at: score(served.url, f"id-{at}"), range(40)))
    # answers reach the shared file within a second, so that any worker finds them
    until(lambda: send(served.url, ids, "green")["taken"] == 40)
    assert send(served.url, ids[:30], "blue")["taken"] == 30, "the last one of a row counts"
    for _ in range(4):
        found = model(served.url)["feedback"]["1"]
        assert (found["judged_rows"], found["accuracy"]) == (40, 0.75), "by any worker"
    wrong = {"feedback": [{"request_id": "id-1", "row": 0, "label": "pink"}]}
    answer = requests.post(f"{served.url}/feedback", json=wrong, timeout=60)
    assert answer.status_code == 400
    until(lambda: tags(client).get("served.judged_rows") == "40")
    until(lambda: tags(client)["served.requests"] == "40")
    assert tags(client)["served.accuracy"] == "0.75"
    old = pids(served.url)
    os.kill(old[0], signal.SIGKILL)
    until(lambda: len(pids(served.url)) == 2 and old[0] not in pids(served.url), START_S)
    assert model(served.url)["feedback"]["1"]["judged_rows"] == 40
    metrics = retried(lambda: requests.get(f"{served.url}/metrics", timeout=60)).text
    assert 'pt_deploy_judged_rows{model="tiny",version="1"} 40.0' in metrics


def test_workers_share_feedback_and_write_back_once(client: MlflowClient, tmp_path: Path) -> None:
    words = ("models:/tiny@champion", "--replicas", "2", "--poll-s", "0.1", "--report-s", "0.5")
    scratch = tmp_path / "scratch"
    with started(scratch, *words, "--feedback-rows", "1000") as served:
        check_feedback(served, client)
        score(served.url, "the last")
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(START_S) == 0
    found = tags(client)
    assert (found["served.requests"], found["served.rows"]) == ("41", "82")
    assert (found["served.errors"], found["served.judged_rows"]) == ("0", "40")
    profile = json.loads(found["pt_deploy.served_profile"])
    assert profile["labels"] == {"0": 41, "1": 0, "2": 41}
    assert list(scratch.iterdir()) == []
