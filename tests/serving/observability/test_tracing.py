"""RequestTracer of real requests, kept in memory instead of sent."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from tiny.server import running
from tiny.serving import save_tiny

from mlflow_pt_deploy.errors import MissingExtraError
from mlflow_pt_deploy.registry.addresses import source
from mlflow_pt_deploy.serving.app import Application
from mlflow_pt_deploy.serving.lifecycle.served_model import ServedModel
from mlflow_pt_deploy.serving.observability.tracing import (
    ENDPOINTS,
    RequestTracer,
    tracer_from_environment,
)

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[tuple[str, RequestTracer, InMemorySpanExporter]]:
    exporter = InMemorySpanExporter()
    model = ServedModel("tiny", source(str(save_tiny(tmp_path / "tiny"))))
    model.open()
    tracer = RequestTracer(exporter)
    with running(Application({"tiny": model}, tracer=tracer)) as url:
        yield url, tracer, exporter


def test_each_request_to_a_model_is_a_span(
    kept: tuple[str, RequestTracer, InMemorySpanExporter],
) -> None:
    url, tracer, exporter = kept
    headers = {"traceparent": f"00-{TRACE}-{SPAN}-01"}
    bodies = ({"inputs": ["red"]}, {"instances": ["red"]}, {"inputs": ["explode"]}, {"inputs": 1})
    for body in bodies:
        requests.post(f"{url}/invocations", json=body, headers=headers, timeout=10)
    requests.get(f"{url}/livez", timeout=10)
    tracer.close()
    found = exporter.get_finished_spans()
    assert [span.name for span in found] == ["score tiny"] * len(bodies)
    attributes = [dict(span.attributes or {}) for span in found]
    assert [each["http.response.status_code"] for each in attributes] == [200, 200, 500, 400]
    assert {each["http.route"] for each in attributes} == {"/invocations"}
    assert all(each["pt_deploy.version"] for each in attributes)
    assert attributes[2]["error.type"] == "INTERNAL_ERROR"
    assert [span.status.is_ok for span in found] == [True, True, False, True]
    assert {f"{span.context.trace_id:032x}" for span in found if span.context} == {TRACE}
    assert {f"{span.parent.span_id:016x}" for span in found if span.parent} == {SPAN}
    assert all(span.start_time and span.end_time > span.start_time for span in found)
    assert "explode" not in str(attributes)


def test_without_an_endpoint_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENDPOINTS:
        monkeypatch.delenv(name, raising=False)
    assert tracer_from_environment() is None


def test_an_endpoint_without_the_exporter_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("opentelemetry.exporter") is not None:
        pytest.skip("the exporter is installed here")
    monkeypatch.setenv(ENDPOINTS[0], "http://127.0.0.1:4318")
    with pytest.raises(MissingExtraError, match=r"mlflow-pt-deploy\[otel\]"):
        tracer_from_environment()
