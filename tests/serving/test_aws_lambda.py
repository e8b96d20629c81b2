"""The Lambda handler: every kind of event, and the runtime client of AWS against a small API."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from tiny.artifact import SAVED

from mlflow_pt_deploy.errors import RequestError
from mlflow_pt_deploy.serving import aws_lambda

BODY = json.dumps({"inputs": ["my card"]})
HTTP_V2 = {"version": "2.0", "requestContext": {"http": {"method": "POST"}}, "body": BODY}
REST_V1 = {
    "httpMethod": "POST",
    "requestContext": {"stage": "prod"},
    "body": base64.b64encode(BODY.encode()).decode(),
    "isBase64Encoded": True,
}
ALB = {"httpMethod": "POST", "requestContext": {"elb": {}}, "body": BODY, "isBase64Encoded": False}


@pytest.fixture(autouse=True)
def model(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PT_DEPLOY_MODEL", str(SAVED))
    aws_lambda.load.cache_clear()
    yield
    aws_lambda.load.cache_clear()


def labels(predictions: list[dict[str, Any]]) -> list[str]:
    return [each["label"] for each in predictions]


def test_a_direct_event() -> None:
    answer = aws_lambda.handler({"inputs": ["my card", "i want a refund"]})
    assert labels(answer["predictions"]) == ["card", "refund"]
    ranked = aws_lambda.handler({"inputs": ["my card"], "params": {"top_k": 2}})
    assert len(ranked["predictions"][0]) == 2


def test_an_explanation() -> None:
    asked = {"inputs": ["my card"], "params": {"explain": True}}
    (found,) = aws_lambda.handler(asked)["predictions"]
    assert found["explanation"]["method"] == "gradient_x_input"
    assert max(found["explanation"]["contributions"], key=lambda each: each["value"])["start"] == 3
    with pytest.raises(RequestError, match="may have 8"):
        aws_lambda.handler(asked | {"inputs": ["my card"] * 9})


@pytest.mark.parametrize("event", [HTTP_V2, REST_V1, ALB], ids=["HTTP 2.0", "REST 1.0", "ALB"])
def test_http_events(event: dict[str, Any]) -> None:
    answer = aws_lambda.handler(event)
    assert answer["statusCode"] == 200
    assert answer["headers"]["content-type"] == "application/json"
    assert labels(json.loads(answer["body"])["predictions"]) == ["card"]


@pytest.mark.parametrize(
    "changes",
    [
        {"body": "{"},
        {"body": None},
        {"body": '{"inputs": [1]}'},
        {"body": '{"inputs": ["a"], "params": {"top_k": 99}}'},
        {"body": "no base64!", "isBase64Encoded": True},
        {"body": {"inputs": []}},
        {"body": json.dumps({"inputs": ["a"] * 1025})},
    ],
)
def test_bad_bodies_are_400(changes: dict[str, Any]) -> None:
    answer = aws_lambda.handler(ALB | changes)
    assert answer["statusCode"] == 400
    assert json.loads(answer["body"])["error_code"] == "INVALID_PARAMETER_VALUE"


def test_a_bad_direct_event_is_an_error_of_the_function() -> None:
    with pytest.raises(RequestError, match="exactly one of inputs"):
        aws_lambda.handler({"rows": []})


def test_a_health_check_is_answered_without_scoring() -> None:
    assert aws_lambda.handler({"httpMethod": "GET", "requestContext": {"elb": {}}}) == {
        "statusCode": 200,
        "headers": {"content-type": "application/json"},
        "body": "{}",
        "isBase64Encoded": False,
    }


class RuntimeApi(BaseHTTPRequestHandler):
    """Lambda's runtime API with two events; collects what the function answers."""

    events: list[dict[str, Any]]
    answers: list[tuple[str, Any]]

    def do_GET(self) -> None:
        if not self.events:
            self.server.shutdown_request(self.request)  # type: ignore[attr-defined]
            return
        body = json.dumps(self.events.pop(0)).encode()
        self.send_response(200)
        self.send_header("Lambda-Runtime-Aws-Request-Id", str(len(self.events)))
        self.send_header("Lambda-Runtime-Deadline-Ms", str(round(1000 * time.time()) + 30_000))
        self.send_header("Lambda-Runtime-Invoked-Function-Arn", "arn:aws:lambda:x")
        self.send_header("Content-Type", "application/json")  # without it the client crashes
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers["Content-Length"]))
        self.answers.append((self.path.rpartition("/")[2], json.loads(text)))
        self.send_response(202)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


def test_the_runtime_client_of_aws_without_mlflow_and_torch(tmp_path: Path) -> None:
    pytest.importorskip("awslambdaric")
    (tmp_path / "handler.py").write_text(
        "import sys\n"
        "from mlflow_pt_deploy.serving.aws_lambda import handler as score\n"
        "def handler(event, context):\n"
        "    found = [name for name in ('mlflow', 'torch') if name in sys.modules]\n"
        "    return score(event) | {'found': found}\n"
    )
    api = type("Api", (RuntimeApi,), {"events": [HTTP_V2, ALB | {"body": "{"}], "answers": []})
    with HTTPServer(("127.0.0.1", 0), api) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        root = str(Path(aws_lambda.__file__).parents[2])
        environment = {
            "PYTHONPATH": os.pathsep.join([str(tmp_path), root]),
            "AWS_LAMBDA_RUNTIME_API": f"127.0.0.1:{server.server_port}",
        }
        subprocess.run(
            [sys.executable, "-m", "awslambdaric", "handler.handler"],
            env=os.environ | environment,
            cwd=tmp_path,
            capture_output=True,
            timeout=120,
            check=False,
        )
        server.shutdown()
    assert [kind for kind, _ in api.answers] == ["response", "response"]
    assert [answer["statusCode"] for _, answer in api.answers] == [200, 400]
    assert api.answers[0][1]["found"] == []
