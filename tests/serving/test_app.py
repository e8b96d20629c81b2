"""The server of ``pt-deploy serve``, and MLflow's own, on real ports."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow
import pytest
import requests
from mlflow.pyfunc import PyFuncModel, scoring_server
from tiny.server import running, until
from tiny.serving import save_tiny

from mlflow_pt_deploy.errors import ModelError
from mlflow_pt_deploy.registry.addresses import ResolvedVersion, source
from mlflow_pt_deploy.serving.app import Application
from mlflow_pt_deploy.serving.lifecycle.served_model import ServedModel
from mlflow_pt_deploy.serving.model.loaded_model import LoadedModel

SECRET = "zanzibar"
JSON = {"Content-Type": "application/json"}
LIMIT = 20_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[PyFuncModel]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "true")
        yield mlflow.pyfunc.load_model(str(folder))


@pytest.fixture(scope="module")
def ours(model: PyFuncModel) -> Iterator[str]:
    slot = ServedModel("tiny", source("tiny"))
    slot.current = LoadedModel(model, ResolvedVersion("tiny"))
    with running(Application({"tiny": slot}, max_body_bytes=LIMIT)) as url:
        yield url


@pytest.fixture(scope="module")
def stock(model: PyFuncModel) -> Iterator[str]:
    with running(scoring_server.init(model)) as url:
        yield url


def post(url: str, body: Any, **headers: str) -> requests.Response:
    data = json.dumps(body) if isinstance(body, dict) else body
    return requests.post(f"{url}/invocations", data=data, headers=JSON | headers, timeout=10)


@pytest.mark.parametrize(
    "body",
    [
        {"inputs": ["red", "blue"], "params": {"top_k": 2}},
        {"inputs": ["red", "blue"]},
        {"inputs": "red"},
        {"inputs": {"text": ["red", "blue"]}},
        {"instances": ["red", "blue"]},
        {"instances": [{"text": "red"}, {"text": "blue"}]},
        {"dataframe_split": {"columns": ["text"], "data": [["red"], ["blue"]]}},
        {"dataframe_records": [{"text": "red"}, {"text": "blue"}]},
    ],
)
def test_answers_are_those_of_mlflow(ours: str, stock: str, body: dict[str, Any]) -> None:
    mine, theirs = post(ours, body), post(stock, body)
    assert mine.status_code == theirs.status_code == 200
    assert mine.json() == theirs.json()
    assert mine.headers["content-type"] == theirs.headers["content-type"]


def test_csv_is_understood(ours: str) -> None:
    answer = post(ours, "text\ngreen\n", **{"Content-Type": "text/csv; charset=utf-8"})
    assert answer.json()["predictions"][0]["label"] == "green"


@pytest.mark.parametrize(
    ("body", "media", "status", "field"),
    [
        (f'{{"inputs": ["{SECRET}"', "application/json", 400, "not valid JSON"),
        ("[" * 100_00, "application/json", 400, "not valid JSON"),
        (b"\xff\xfe", "application/json", 400, "not valid JSON"),
        (f'["{SECRET}"]', "application/json", 400, "inputs, instances, dataframe_split"),
        ({SECRET: 1}, "application/json", 400, "inputs, instances, dataframe_split"),
        ({"inputs": ["a"], "instances": ["a"]}, "application/json", 400, "exactly one"),
        ({"inputs": [SECRET, 7]}, "application/json", 400, "'text' row 1"),
        ({"inputs": [SECRET, None]}, "application/json", 400, "'text' row 1 is null"),
        ({"inputs": {"txet": [SECRET]}}, "application/json", 400, "'text' is missing"),
        ({"inputs": [[SECRET, "a"]]}, "application/json", 400, "'text' row 0 is a list"),
        ({"inputs": [SECRET], "params": {"top_k": SECRET}}, "application/json", 400, "top_k"),
        ({"inputs": [SECRET], "params": {"top_k": 9}}, "application/json", 400, "'top_k'"),
        ({"inputs": [SECRET], "params": [SECRET]}, "application/json", 400, "'params'"),
        ({"dataframe_split": {SECRET: 1}}, "application/json", 400, "'dataframe_split'"),
        ({"dataframe_records": SECRET}, "application/json", 400, "'dataframe_records'"),
        ({"inputs": ["red"] * 1025}, "application/json", 400, "queue_rows"),
        (SECRET, "application/vnd.apache.parquet", 400, "parquet"),
        ('text\n"' + SECRET, "text/csv", 400, "text/csv"),
        (b"text\n\xff\xff\n", "text/csv", 400, "text/csv"),
        ({"inputs": ["a"]}, "text/plain", 415, "'Content-Type'"),
        ({"inputs": ["a"]}, "application/json; charset=latin1", 415, "'Content-Type'"),
        ({"inputs": [f"explode {SECRET}"]}, "application/json", 500, "the server's log"),
    ],
)
def test_errors_name_the_field_and_repeat_nothing(
    ours: str, body: Any, media: str, status: int, field: str
) -> None:
    answer = post(ours, body, **{"Content-Type": media})
    assert answer.status_code == status
    assert answer.json().keys() == {"error_code", "message"}
    assert field in answer.json()["message"]
    for leak in (SECRET, "Traceback", "stack_trace", "/path", str(Path.cwd())):
        assert leak not in answer.text


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"inputs": [SECRET, None]}, 400),
        ({"inputs": {"txet": [SECRET]}}, 400),
        ({"inputs": [SECRET], "params": {"top_k": 9}}, 400),
        ({"inputs": [SECRET] * 1025}, 400),
        ({"inputs": [f"explode {SECRET}"]}, 500),
    ],
)
def test_the_stock_server_repeats_nothing_either(
    stock: str, body: dict[str, Any], status: int
) -> None:
    answer = post(stock, body)
    assert answer.status_code == status
    assert SECRET not in answer.text
    assert "Traceback" not in answer.text


@pytest.mark.parametrize("chunked", [False, True])
def test_a_long_body_is_413_and_names_the_limit(ours: str, chunked: bool) -> None:
    body = b"x" * (LIMIT + 1)
    answer = post(ours, iter([body[:5000], body[5000:]]) if chunked else body)
    assert answer.status_code == 413
    assert f"longer than {LIMIT} bytes" in answer.json()["message"]
    assert post(ours, {"inputs": ["red"]}).status_code == 200


def test_a_client_that_leaves_does_no_harm(ours: str) -> None:
    host, port = ours.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
    assert post(ours, {"inputs": ["red"]}).status_code == 200


@pytest.mark.parametrize("path", ["/ping", "/health", "/version", "/livez", "/readyz"])
def test_probes_answer(ours: str, path: str) -> None:
    assert requests.get(ours + path, timeout=5).status_code == 200
    head = requests.head(ours + path, timeout=5)
    assert (head.status_code, head.content) == (200, b"")


def test_a_model_that_hangs_is_told_of(tmp_path: Path) -> None:
    slot = ServedModel("tiny", source(str(save_tiny(tmp_path / "tiny", predict_s=0.005, hang_s=1.5))))
    slot.open()
    with running(Application({"tiny": slot}, hang_s=0.5)) as url, ThreadPoolExecutor(1) as pool:
        for path in ("/livez", "/readyz", "/ping"):
            assert requests.get(url + path, timeout=5).status_code == 200
        stuck = pool.submit(post, url, {"inputs": ["explode"]})
        until(lambda: requests.get(f"{url}/livez", timeout=5).status_code == 503)
        assert requests.get(f"{url}/livez", timeout=5).json() == {"status": "hangs"}
        assert requests.get(f"{url}/readyz", timeout=5).status_code == 503
        assert stuck.result().status_code == 500
        assert requests.get(f"{url}/livez", timeout=5).status_code == 200
        assert requests.get(f"{url}/readyz", timeout=5).status_code == 200


def test_a_client_may_give_a_deadline_of_its_own(ours: str) -> None:
    late = post(ours, {"inputs": ["green"]}, **{"X-Deadline-Ms": "0"})
    assert late.status_code == 504
    assert post(ours, {"inputs": ["green"]}, **{"X-Deadline-Ms": "5000"}).status_code == 200
    assert post(ours, {"inputs": ["green"]}, **{"X-Deadline-Ms": "soon"}).status_code == 200


def test_model_says_what_is_served(ours: str) -> None:
    about = requests.get(f"{ours}/model", timeout=5).json()
    assert about["name"] == "tiny-numpy-fp32"
    assert about["model"] == "tiny"
    assert about["digest"] == "0" * 64
    assert about["version"] == "0" * 12
    assert about["observed"]["answers"] >= 0
    assert about["refused"] is None
    assert requests.get(f"{ours}/models/tiny", timeout=5).json()["since"] == about["since"]
    assert len(requests.get(f"{ours}/models", timeout=5).json()) == 1


def test_the_version_that_answered_is_told(ours: str) -> None:
    for path in ("", "/models/tiny"):
        answer = post(ours + path, {"inputs": ["red"]})
        assert answer.headers["x-model-version"] == "0" * 12
    assert post(ours, "{").headers["x-model-version"] == "0" * 12


def test_methods_and_paths_that_do_not_exist(ours: str) -> None:
    assert requests.get(f"{ours}/invocations", timeout=5).status_code == 405
    assert requests.get(f"{ours}/nothing", timeout=5).status_code == 404


def test_many_clients_at_once(ours: str) -> None:
    def client(color: str) -> None:
        with requests.Session() as session:
            for _ in range(10):
                answer = session.post(
                    f"{ours}/invocations", json={"inputs": [color, "red"]}, timeout=10
                )
                assert [row["label"] for row in answer.json()["predictions"]] == [color, "red"]

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(client, ["red", "green", "blue", "green"] * 4))


def test_a_model_of_another_flavor_is_refused(model: PyFuncModel) -> None:
    class Other:
        def predict(self, data: Any) -> Any:
            return data

    with pytest.raises(ModelError, match="mlflow models serve"):
        LoadedModel(PyFuncModel(model.metadata, Other()), ResolvedVersion("other"))


def test_serve_says_where_it_listens_and_stops_when_told(folder: Path) -> None:
    code = f"from mlflow_pt_deploy.serving.api import serve; serve({str(folder)!r}, port=0)"
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path, "MLFLOW_DISABLE_TELEMETRY": "true"},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout
            line = process.stdout.readline()
            found = re.match(r"tiny-numpy-fp32 on (http://127.0.0.1:\d+)   try: curl ", line)
            assert found, line
            assert post(found[1], {"inputs": ["red"]}).json()["predictions"][0]["label"] == "red"
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0
        finally:
            process.kill()
