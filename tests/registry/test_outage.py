"""What MLflow's client raises while a registry is down, and what it raises for an answer."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.utils.models import get_model_name_and_version
from tiny.server import free_port

from mlflow_pt_deploy.registry.addresses import resolve
from mlflow_pt_deploy.registry.outage import answer_within, is_outage

URI = "models:/tiny@champion"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")


@contextmanager
def registry(status: int, content: object) -> Iterator[str]:
    """A server that answers everything alike; never if the status is 0."""
    released = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not status:
                released.wait(30)
                return
            body = content.encode() if isinstance(content, str) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            released.set()
            server.shutdown()
            thread.join()


def error_of(url: str) -> Exception:
    """What `resolve` would raise."""
    with pytest.raises(MlflowException) as caught:
        get_model_name_and_version(MlflowClient(url, url), URI)
    return caught.value


@pytest.mark.parametrize(
    ("status", "content", "outage"),
    [
        (0, "", True),
        (500, {"error_code": "INTERNAL_ERROR", "message": "broken"}, True),
        (502, "<html>bad gateway</html>", True),
        (503, {"error_code": "TEMPORARILY_UNAVAILABLE", "message": "later"}, True),
        (404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such model"}, False),
        (403, {"error_code": "PERMISSION_DENIED", "message": "no"}, False),
        (401, "You are not authenticated", False),
        (400, {"error_code": "INVALID_PARAMETER_VALUE", "message": "no"}, False),
        (200, "<html>a login page</html>", False),
    ],
)
def test_an_outage_is_told_from_an_answer(status: int, content: object, outage: bool) -> None:
    with registry(status, content) as url:
        assert is_outage(error_of(url)) is outage


def test_a_refused_connection_and_an_unknown_host_are_outages() -> None:
    for host in (f"127.0.0.1:{free_port()}", "registry.invalid"):
        assert is_outage(error_of(f"http://{host}"))


def test_a_missing_model_in_a_database_is_an_answer(tracking: str) -> None:
    with pytest.raises(MlflowException, match="not found") as caught:
        resolve(URI)
    assert not is_outage(caught.value)


def test_a_database_without_tables_is_an_outage(tracking: str, tmp_path: Path) -> None:
    MlflowClient().search_registered_models()
    (tmp_path / "mlflow.db").write_bytes(b"")
    with pytest.raises(MlflowException) as caught:
        resolve(URI)
    assert is_outage(caught.value)


def test_an_answer_is_waited_for() -> None:
    assert answer_within(10, lambda: 7) == 7
    with pytest.raises(KeyError):
        answer_within(10, lambda: {}["no"])


def test_a_late_answer_is_an_outage() -> None:
    released = threading.Event()
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"the registry did not answer within 0\.05 s") as caught:
        answer_within(0.05, lambda: released.wait(30))
    released.set()
    assert time.monotonic() - start < 20
    assert is_outage(caught.value)
