"""Log lines: one shape, as text and as JSON; the access log repeats nothing of a request."""

import json
import logging
import re
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest
import requests
from tiny.server import running
from tiny.serving import save_tiny

from mlflow_pt_deploy.registry.addresses import source
from mlflow_pt_deploy.serving.app import Application
from mlflow_pt_deploy.serving.lifecycle.served_model import ServedModel
from mlflow_pt_deploy.serving.observability.access_log import AccessLog
from mlflow_pt_deploy.serving.observability.server_log import Formatter, RateLimit, server_log

SECRET = "zanzibar"
TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00"


def record(message: str, **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("mlflow_pt_deploy.x", logging.INFO, "", 1, message, (), None)
    made.fields = fields
    return made


@pytest.fixture
def logged() -> Iterator[tuple[logging.Logger, StringIO]]:
    """A logger of this package whose lines are written as JSON."""
    logger, stream = logging.getLogger("mlflow_pt_deploy"), StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(Formatter("json", replica=1))
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield logger, stream
    logger.removeHandler(handler)
    logger.setLevel(before)


def test_a_text_line_has_time_level_fields_and_message() -> None:
    line = Formatter("text", replica=1).format(record("it was loaded", ms=1.5, error=None))
    assert re.fullmatch(rf"{TIME} INFO replica=1 ms=1.5 it was loaded", line)
    assert re.fullmatch(
        rf"{TIME} INFO it was loaded", Formatter("text").format(record("it was loaded"))
    )


def test_a_json_line_is_one_object_in_one_line() -> None:
    text = Formatter("json", replica=0).format(record("two\nlines", ms=1.5))
    assert "\n" not in text
    line = json.loads(text)
    assert re.fullmatch(TIME, line.pop("time"))
    assert line == {"level": "INFO", "replica": 0, "ms": 1.5, "message": "two\nlines"}


def test_a_traceback_belongs_to_its_line(logged: tuple[logging.Logger, StringIO]) -> None:
    logger, stream = logged
    try:
        raise ValueError("wrong")
    except ValueError:
        logger.exception("it failed")
    (line,) = stream.getvalue().splitlines()
    assert "ValueError: wrong" in json.loads(line)["traceback"]


def test_a_message_that_repeats_is_silenced_but_responses_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [120.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    limit = RateLimit()
    passed = [each for each in (record("bad %s") for _ in range(500)) if limit.filter(each)]
    assert len(passed) == 60
    assert "silenced for this minute" in passed[-1].getMessage()
    assert limit.filter(record("another message"))
    access = record("%s %d")
    access.name = "mlflow_pt_deploy.access"
    assert all(limit.filter(access) for _ in range(500))
    now[0] += 60
    assert limit.filter(record("bad %s"))


def test_a_program_that_set_up_logging_keeps_it(logged: tuple[logging.Logger, StringIO]) -> None:
    before = list(logged[0].handlers)
    with server_log("json"):
        assert logged[0].handlers == before


def test_the_access_log_repeats_nothing_of_a_request(
    tmp_path: Path, logged: tuple[logging.Logger, StringIO]
) -> None:
    model = ServedModel("tiny", source(str(save_tiny(tmp_path / "tiny"))))
    model.open()
    requests_sent = [
        ("/invocations", [SECRET]),
        ("/invocations", [SECRET, "explode"]),
        (f"/{SECRET}?{SECRET}", [SECRET]),
        ("/invocations", []),
    ]
    with running(Application({"tiny": model}, access_log=AccessLog())) as url:
        answers = [
            requests.post(url + path, json={"inputs": texts}, timeout=10)
            for path, texts in requests_sent
        ]
        assert requests.get(f"{url}/readyz", timeout=5).status_code == 200
    assert SECRET not in logged[1].getvalue()
    lines = [json.loads(line) for line in logged[1].getvalue().splitlines()]
    lines = [line for line in lines if "route" in line]
    assert [(line["route"], line["status"]) for line in lines] == [
        ("/invocations", 200),
        ("/invocations", 500),
        ("-", 404),
        ("/invocations", 400),
    ]
    assert [line["request_id"] for line in lines] == [
        answer.headers["x-request-id"] for answer in answers
    ]
    assert lines[0]["version"] == "000000000000"
    assert lines[1]["error"] == "INTERNAL_ERROR"
    assert lines[0]["bytes"] == len(answers[0].content)
    assert lines[0]["ms"] > 0
