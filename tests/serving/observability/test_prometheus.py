"""The exposition of `/metrics`."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import requests
from tiny.server import running, until
from tiny.serving import save_tiny

from mlflow_pt_deploy.registry.addresses import source
from mlflow_pt_deploy.serving.app import Application
from mlflow_pt_deploy.serving.batching.executor import ModelExecutor
from mlflow_pt_deploy.serving.lifecycle.served_model import ServedModel
from mlflow_pt_deploy.serving.observability.metrics import Metrics
from mlflow_pt_deploy.serving.observability.prometheus import PrometheusMetrics

SECRET = "zanzibar"


def ask(url: str, texts: list[str], path: str = "/invocations") -> int:
    return requests.post(url + path, json={"inputs": texts}, timeout=10).status_code


def read(url: str) -> Callable[..., float | None]:
    """All series of a server, by name and labels."""
    from prometheus_client.parser import text_string_to_metric_families

    text = requests.get(f"{url}/metrics", timeout=5).text
    assert SECRET not in text
    found = {
        (sample.name.removeprefix("pt_deploy_"), frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    return lambda name, **labels: found.get((name, frozenset(labels.items())))


def test_events_are_counted_by_model_and_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("prometheus_client")
    monkeypatch.setattr(ModelExecutor, "padding_budget", 64)  # one call, whatever it costs here
    metrics = PrometheusMetrics()
    file = tmp_path / "target.json"
    file.write_text(json.dumps({"uri": str(save_tiny(tmp_path / "tiny"))}))
    model = ServedModel("tiny", source(f"@{file}"), metrics=metrics)
    with running(Application({"tiny": model}, metrics=metrics)) as url:
        assert ask(url, ["red"]) == 503
        model.open()
        assert ask(url, ["red", "green red", "blue"]) == 200
        assert ask(url, [f"explode {SECRET}"]) == 500
        assert ask(url, []) == 400
        file.write_text(json.dumps({"uri": str(save_tiny(tmp_path / "bad", refuse="no"))}))
        model.poll()
        file.write_text(json.dumps({"uri": str(save_tiny(tmp_path / "next"))}))
        model.poll()
        of = {"model": "tiny", "version": "000000000000"}
        until(lambda: read(url)("request_seconds_count", **of) == 3)
        value = read(url)
    assert value("requests_total", status="200", **of) == 1
    assert value("requests_total", status="500", **of) == 1
    assert value("requests_total", status="503", model="tiny", version="") == 1
    assert value("errors_total", error="INTERNAL_ERROR", **of) == 1
    assert value("errors_total", error="INVALID_PARAMETER_VALUE", **of) == 1
    assert value("batch_rows_sum", **of) == 3
    assert value("batch_tokens_total", **of) == 4
    assert value("batch_padding_tokens_total", **of) == 2
    assert value("compute_seconds_count", **of) == 1
    assert value("swaps_total", model="tiny", result="done") == 1
    assert value("swaps_total", model="tiny", result="refused") == 1
    for name, expected in (("registry_up", 1), ("queue_rows", 0), ("in_flight", 0), ("streams", 1)):
        assert value(name, model="tiny") == expected
    assert value("model_info", variant="tiny-numpy-fp32", digest="0" * 64, **of) == 1
    assert (value("resident_memory_bytes") or 0) > 0


def test_without_the_extra_the_response_names_it(tmp_path: Path) -> None:
    model = ServedModel("tiny", source(str(save_tiny(tmp_path / "tiny"))))
    with running(Application({"tiny": model}, metrics=Metrics())) as url:
        answer = requests.get(f"{url}/metrics", timeout=5)
    assert answer.status_code == 501
    assert "mlflow-pt-deploy[serve]" in answer.json()["message"]
