"""The fuzzing command reports faults; a script replaces schemathesis."""

import sys
from pathlib import Path
from typing import Any

import fuzz
import pytest
from tiny.server import running
from tiny.serving import save_tiny

from mlflow_pt_deploy.registry.addresses import source
from mlflow_pt_deploy.serving.app import Application
from mlflow_pt_deploy.serving.lifecycle.served_model import ServedModel

SCRIPT = """
import json, sys
(report,) = (word[18:] for word in sys.argv if word.startswith("--report-har-path="))
entries = [
    {"request": {"method": "POST", "url": "x", "headers": []}, "response": {"status": int(status)}}
    for status in sys.argv[1].split(",") if status
]
json.dump({"log": {"entries": entries}}, open(report, "w"))
"""


def entry(status: int, **headers: str) -> dict[str, Any]:
    fields = [{"name": name.replace("_", "-"), "value": value} for name, value in headers.items()]
    return {"request": {"headers": fields}, "response": {"status": status}}


@pytest.mark.parametrize("status", [200, 400, 405, 429])
def test_what_may_be_answered(status: int) -> None:
    assert not fuzz.is_fault(entry(status))


def test_a_missed_deadline_is_the_requests_own() -> None:
    assert not fuzz.is_fault(entry(504, X_Deadline_Ms="0"))
    assert fuzz.is_fault(entry(504))
    assert fuzz.is_fault(entry(504, X_Deadline_Ms="soon"))


@pytest.mark.parametrize("status", [0, 500, 501, 503])
def test_faults(status: int) -> None:
    assert fuzz.is_fault(entry(status, X_Deadline_Ms="0"))


def test_rounds_go_on_until_enough_was_sent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = [sys.executable, "-c", SCRIPT]
    assert fuzz.fuzz([*start, "200,400"], tmp_path, 5, 7) == []
    assert capsys.readouterr().out.splitlines()[-1] == "seed 9: 6 sent; 200: 3, 400: 3; 0 faults"
    (fault,) = fuzz.fuzz([*start, "200,500"], tmp_path, 2, 1)
    assert fault.startswith("500: POST x")
    assert fuzz.fuzz([*start, ""], tmp_path, 2, 1) == ["only 0 of 2 requests were sent"]
    faults = fuzz.fuzz([sys.executable, "-c", "exit('not content')"], tmp_path, 2, 1)
    assert faults == ["not content\n", "only 0 of 2 requests were sent"]


@pytest.mark.parametrize("label", ["red", "wrong"])
def test_the_server_must_be_right_afterwards(tmp_path: Path, label: str) -> None:
    models = {}
    for name in ("quick", "slow"):
        models[name] = ServedModel(name, source(str(save_tiny(tmp_path / name, label=label))))
        models[name].open()
    with running(Application(models)) as url:
        faults = fuzz.after(url)
    assert [fault.split(" with ")[0] for fault in faults] == (
        [] if label == "red" else ["/invocations answers red"]
    )
    (gone,) = fuzz.after(url)
    assert gone.startswith("the server does not respond after the last round")
