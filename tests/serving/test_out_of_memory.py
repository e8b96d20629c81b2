"""Rows that find no device memory: 503 for their request only, in metrics and status."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from tiny.server import running
from tiny.serving import save_tiny

from mlflow_pt_deploy.registry.addresses import source
from mlflow_pt_deploy.serving.app import Application
from mlflow_pt_deploy.serving.lifecycle.served_model import ServedModel
from mlflow_pt_deploy.serving.observability.prometheus import PrometheusMetrics


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    metrics = PrometheusMetrics()
    model = ServedModel(
        "tiny", source(str(save_tiny(tmp_path / "tiny", full_on="slow"))), metrics=metrics
    )
    model.open()
    with running(Application({"tiny": model}, metrics=metrics)) as url:
        yield url


def ask(url: str, *texts: str) -> requests.Response:
    return requests.post(f"{url}/invocations", json={"inputs": list(texts)}, timeout=10)


def test_the_request_gets_503_and_others_are_answered(url: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        words = ["slow red" if number % 4 == 0 else "red" for number in range(40)]
        answers = list(pool.map(lambda word: ask(url, word), words))
    assert [each.status_code for each in answers] == [503, 200, 200, 200] * 10
    failed = answers[0]
    assert failed.headers["Retry-After"] == "1"
    assert failed.json() == {
        "error_code": "TEMPORARILY_UNAVAILABLE",
        "message": "a row needs more memory than is free on the device; retry later, or send a "
        "shorter row",
    }


def test_the_open_inference_protocol(url: str) -> None:
    tensor = {"name": "text", "datatype": "BYTES", "shape": [2], "data": ["red", "slow"]}
    answer = requests.post(f"{url}/v2/models/tiny/infer", json={"inputs": [tensor]}, timeout=10)
    assert answer.status_code == 503
    assert answer.headers["Retry-After"] == "1"
    assert answer.json()["error"].startswith("a row needs more memory")


def test_metrics_and_status(url: str) -> None:
    assert requests.get(f"{url}/model", timeout=10).json()["device_memory"] == {
        "batch_limit": 0,
        "out_of_memory": 0,
    }
    assert ask(url, "red blue", "slow", "red green").status_code == 503
    memory = requests.get(f"{url}/model", timeout=10).json()["device_memory"]
    assert memory["batch_limit"] > 0 and memory["out_of_memory"] > 1
    for _ in range(2):  # the counter is sampled, and not counted again
        text = requests.get(f"{url}/metrics", timeout=10).text
        assert f'pt_deploy_device_batch_limit{{model="tiny"}} {memory["batch_limit"]:.1f}' in text
        total = (
            f'pt_deploy_device_out_of_memory_total{{model="tiny"}} {memory["out_of_memory"]:.1f}'
        )
        assert total in text
