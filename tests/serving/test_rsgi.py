"""The RSGI adapter: what it passes on, and how many function calls a request costs."""

import asyncio
import json
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

import pytest
from tiny.serving import save_tiny

from mlflow_pt_deploy.registry.addresses import source
from mlflow_pt_deploy.serving.app import Application
from mlflow_pt_deploy.serving.http.auth import TokenAuth
from mlflow_pt_deploy.serving.lifecycle.served_model import ServedModel
from mlflow_pt_deploy.serving.monitoring.feedback import FeedbackCollector
from mlflow_pt_deploy.serving.monitoring.feedback_store import FeedbackStore
from mlflow_pt_deploy.serving.observability.metrics import Metrics
from mlflow_pt_deploy.serving.observability.prometheus import PrometheusMetrics
from mlflow_pt_deploy.serving.rsgi import RsgiAdapter

TOKEN = "t" * 16
BODY = b'{"inputs": ["red green"]}'
HEADERS = {
    "content-type": "application/json",
    "content-length": str(len(BODY)),
    "authorization": f"Bearer {TOKEN}",
    "x-deadline-ms": "60000",
}
MOST_CALLS = 80


class Scope:
    """granian's description of a request."""

    def __init__(self, method: str, path: str, headers: Mapping[str, str]) -> None:
        self.method, self.path, self.headers = method, path, headers


class Protocol:
    """granian's HTTP protocol object, with a body that has arrived."""

    def __init__(self, *parts: bytes, lost: bool = False) -> None:
        self.parts, self.lost = parts, lost
        self.status, self.body = 0, b""
        self.headers: dict[str, str] = {}

    async def __call__(self) -> bytes:
        if self.lost:
            raise RuntimeError("RSGIProtocolClosed")
        return b"".join(self.parts)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for part in self.parts:
            yield part
        if self.lost:
            raise RuntimeError("RSGIProtocolClosed")

    async def client_disconnect(self) -> None:
        await asyncio.Event().wait()

    def response_bytes(self, status: int, headers: Sequence[tuple[str, str]], body: bytes) -> None:
        self.status, self.headers, self.body = status, dict(headers), body


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RsgiAdapter]:
    model = ServedModel("tiny", source(str(save_tiny(tmp_path_factory.mktemp("rsgi") / "tiny"))))
    model.open()
    assert model.current is not None
    model.current.pyfunc.service.runs_inline = True
    auth = TokenAuth((TOKEN.encode(),))
    application = Application({"tiny": model}, metrics=PrometheusMetrics(), auth=auth)
    yield RsgiAdapter(application)
    application.stop()


def ask(
    adapter: RsgiAdapter, protocol: Protocol, path: str = "/invocations", **headers: str | None
) -> Protocol:
    names = HEADERS | {name.replace("_", "-"): value for name, value in headers.items()}
    given = {name: value for name, value in names.items() if value is not None}
    asyncio.run(adapter.__rsgi__(Scope("POST", path, given), protocol))
    return protocol


def test_a_request_is_answered(adapter: RsgiAdapter) -> None:
    answer = ask(adapter, Protocol(BODY), x_request_id="my-id")
    assert answer.status == 200
    assert json.loads(answer.body)["predictions"][0]["label"] in ("red", "green")
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"] == "my-id"


def test_a_chunked_body_is_joined(adapter: RsgiAdapter) -> None:
    answer = ask(adapter, Protocol(BODY[:9], BODY[9:]), content_length=None, transfer_encoding="x")
    assert answer.status == 200


@pytest.mark.parametrize("length", [str(len(BODY)), None])
def test_a_client_that_disconnects_is_499(adapter: RsgiAdapter, length: str | None) -> None:
    chunked = None if length else "chunked"
    lost = Protocol(BODY[:9], lost=True)
    answer = ask(adapter, lost, content_length=length, transfer_encoding=chunked)
    assert answer.status == 499


def test_a_rejected_request_is_read_first(adapter: RsgiAdapter) -> None:
    for path, status in (("/invocations", 401), ("/nothing", 404)):
        answer = ask(adapter, Protocol(BODY, lost=True), path, authorization=None)
        assert answer.status == status


def calls_of_ours(adapter: RsgiAdapter) -> list[str]:
    """Functions of this package that a request calls; each step of a coroutine counts as one."""
    names: list[str] = []

    def count(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_globals.get("__name__", "").startswith("mlflow_pt_deploy."):
            names.append(frame.f_code.co_qualname)

    async def respond() -> None:
        for measured in (False, True):
            protocol = Protocol(BODY)
            sys.setprofile(count if measured else None)
            await adapter.__rsgi__(Scope("POST", "/invocations", HEADERS), protocol)
            sys.setprofile(None)
            assert protocol.status == 200

    asyncio.run(respond())
    return names


def test_the_common_request_takes_few_calls_of_ours(adapter: RsgiAdapter) -> None:
    names = calls_of_ours(adapter)
    assert "RsgiAdapter.__rsgi__" in names
    assert 20 < len(names) <= MOST_CALLS, f"{len(names)}: {names}"


def test_an_answer_is_remembered_for_feedback_by_one_call(
    adapter: RsgiAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = calls_of_ours(adapter)
    collector = FeedbackCollector({}, FeedbackStore(tmp_path, 9), Metrics())
    monkeypatch.setattr(adapter._application, "_feedback", collector)
    more = Counter(calls_of_ours(adapter)) - Counter(before)
    assert more == {"FeedbackCollector.remember": 1}
