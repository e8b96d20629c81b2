"""The application behind any ASGI server, beside MLflow's own scoring server."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow
import pytest
import requests
from mlflow.pyfunc import PyFuncModel, scoring_server
from tiny.server import JSON_HEAD, Client, request, running, until
from tiny.serving import save_tiny

from mlflow_pt_deploy.registry.addresses import ResolvedVersion, source
from mlflow_pt_deploy.serving.app import Application
from mlflow_pt_deploy.serving.http.auth import TokenAuth
from mlflow_pt_deploy.serving.lifecycle.served_model import ServedModel
from mlflow_pt_deploy.serving.model.loaded_model import LoadedModel
from mlflow_pt_deploy.serving.observability.prometheus import PrometheusMetrics

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
    served = ServedModel("tiny", source("tiny"))
    served.current = LoadedModel(model._model_impl, ResolvedVersion("tiny"))
    with running(Application({"tiny": served}, max_body_bytes=LIMIT)) as url:
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
        (SECRET, "application/vnd.apache.parquet", 400, "Parquet"),
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


def test_a_client_that_disconnects_harms_no_other(ours: str) -> None:
    with Client(ours) as client:
        client.send(JSON_HEAD + b"Content-Length: 99\r\n\r\n{")
    assert post(ours, {"inputs": ["red"]}).status_code == 200


@pytest.mark.parametrize("path", ["/ping", "/health", "/version", "/livez", "/readyz"])
def test_probes_answer(ours: str, path: str) -> None:
    assert requests.get(ours + path, timeout=5).status_code == 200
    head = requests.head(ours + path, timeout=5)
    assert (head.status_code, head.content) == (200, b"")


def test_probes_fail_while_a_model_hangs(tmp_path: Path) -> None:
    model = ServedModel(
        "tiny", source(str(save_tiny(tmp_path / "tiny", predict_s=0.005, slow_s=3)))
    )
    model.open()
    with running(Application({"tiny": model}, hang_s=0.5)) as url, ThreadPoolExecutor(1) as pool:
        for path in ("/livez", "/readyz", "/ping"):
            assert requests.get(url + path, timeout=5).status_code == 200
        stuck = pool.submit(post, url, {"inputs": ["slow"]})
        until(lambda: requests.get(f"{url}/livez", timeout=5).status_code == 503)
        assert requests.get(f"{url}/livez", timeout=5).json() == {"status": "hangs"}
        assert requests.get(f"{url}/readyz", timeout=5).status_code == 503
        assert stuck.result().status_code == 200
        assert requests.get(f"{url}/livez", timeout=5).status_code == 200
        assert requests.get(f"{url}/readyz", timeout=5).status_code == 200


def test_a_client_may_send_a_deadline(ours: str) -> None:
    late = post(ours, {"inputs": ["green"]}, **{"X-Deadline-Ms": "0"})
    assert late.status_code == 504
    assert post(ours, {"inputs": ["green"]}, **{"X-Deadline-Ms": "5000"}).status_code == 200
    assert post(ours, {"inputs": ["green"]}, **{"X-Deadline-Ms": "soon"}).status_code == 200


def test_model_shows_what_is_served(ours: str) -> None:
    about = requests.get(f"{ours}/model", timeout=5).json()
    assert about["name"] == "tiny-numpy-fp32"
    assert about["model"] == "tiny"
    assert about["digest"] == "0" * 64
    assert about["version"] == "0" * 12
    assert about["observed"]["answers"] >= 0
    assert about["refused"] is None
    assert requests.get(f"{ours}/models/tiny", timeout=5).json()["since"] == about["since"]
    assert len(requests.get(f"{ours}/models", timeout=5).json()) == 1


def test_the_response_names_the_version(ours: str) -> None:
    for path in ("", "/models/tiny"):
        answer = post(ours + path, {"inputs": ["red"]})
        assert answer.headers["x-model-version"] == "0" * 12
    assert post(ours, "{").headers["x-model-version"] == "0" * 12


def test_unknown_methods_and_paths(ours: str) -> None:
    wrong = requests.get(f"{ours}/invocations", timeout=5)
    assert (wrong.status_code, wrong.headers["Allow"]) == (405, "POST")
    wrong = requests.post(f"{ours}/livez", timeout=5)
    assert (wrong.status_code, wrong.headers["Allow"]) == (405, "GET, HEAD")
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


@pytest.mark.parametrize("given", ["abc-1.2:3_4", "x" * 128])
def test_a_plain_request_id_is_returned(ours: str, given: str) -> None:
    answer = post(ours, {"inputs": ["red"]}, **{"X-Request-Id": given})
    assert answer.headers["x-request-id"] == given


@pytest.mark.parametrize("given", [None, "", "two words", "x" * 129, 'a"b', "a;b"])
def test_other_requests_get_an_id_of_their_own(ours: str, given: str | None) -> None:
    headers = {} if given is None else {"X-Request-Id": given}
    ids = {post(ours, body, **headers).headers["x-request-id"] for body in ({"inputs": "a"}, b"{")}
    ids.add(requests.get(f"{ours}/nothing", headers=headers, timeout=5).headers["x-request-id"])
    assert len(ids) == 3
    assert given not in ids


@pytest.mark.parametrize(
    ("media", "status"),
    [
        ("application/json; charset=utf-8;", 200),
        ('application/json; charset="UTF-8"', 200),
        ("application/json;version=1", 200),
        ("application/json; charset=utf-16", 415),
    ],
)
def test_media_type_parameters(ours: str, media: str, status: int) -> None:
    assert post(ours, {"inputs": ["red"]}, **{"Content-Type": media}).status_code == status


def test_a_compressed_body_is_415_and_says_what_is_accepted(ours: str) -> None:
    answer = post(ours, b"\x1f\x8b", **{"Content-Encoding": "gzip"})
    assert (answer.status_code, answer.headers["accept-encoding"]) == (415, "identity")
    assert post(ours, {"inputs": ["red"]}, **{"Content-Encoding": "identity"}).status_code == 200


def test_a_tag_that_is_no_number_does_not_break_the_status_page(model: PyFuncModel) -> None:
    served = ServedModel("tiny", source("tiny"))
    tags = {"accuracy": "abc", "latency_p50_ms": "0.5"}
    served.current = LoadedModel(model._model_impl, ResolvedVersion("tiny"), tags=tags)
    with running(Application({"tiny": served})) as url:
        assert requests.get(f"{url}/model", timeout=5).json()["logged"] == {"latency_p50_ms": 0.5}


def test_an_overloaded_model_rejects_before_parsing_and_reads_the_body_away(
    model: PyFuncModel,
) -> None:
    served = ServedModel("tiny", source("tiny"))
    served.current = LoadedModel(model._model_impl, ResolvedVersion("tiny"))
    metrics = PrometheusMetrics()
    application = Application({"tiny": served}, metrics=metrics, auth=TokenAuth((b"t" * 16,)))
    with pytest.MonkeyPatch.context() as patch, running(application) as url, Client(url) as client:
        admission = served.current.pyfunc.service.batcher.admission
        patch.setattr(admission, "_queued_rows", lambda: 40)
        patch.setattr(admission, "_queue_wait_s", lambda: 9.0)
        head = JSON_HEAD + b"Authorization: Bearer tttttttttttttttt\r\n"
        for _ in range(2):  # the connection stays usable
            answer = client.ask(request(b"x" * 2**20, head))
            assert (answer.status, answer.json()["error_code"]) == (429, "RESOURCE_EXHAUSTED")
            assert answer.headers["retry-after"] == "1"
            assert answer.headers["x-model-version"] == "0" * 12
            assert "estimated wait 9000 ms is too long" in answer.json()["message"]
        assert client.ask(request(b"{}", JSON_HEAD)).status == 401, "nothing of the load is told"
        patch.undo()
        assert client.ask(request({"inputs": ["red"]}, head)).status == 200
    assert b'status="429",version="000000000000"} 2.0' in (metrics.expose() or b"")


def test_a_body_that_does_not_arrive_is_408(ours: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlflow_pt_deploy.serving.http.request.BODY_TIMEOUT_S", 0.2)
    with Client(ours) as client:
        client.send(request({"inputs": ["red"]})[:-3])
        answer = client.read()
    assert (answer.status, answer.json()["error_code"]) == (408, "DEADLINE_EXCEEDED")


def test_a_refused_body_that_does_not_arrive_is_not_waited_for(
    ours: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlflow_pt_deploy.serving.http.request.DISCARD_TIMEOUT_S", 0.2)
    with Client(ours) as client:
        client.send(request(b"x" * 5000, JSON_HEAD.replace(b"/invocations", b"/nothing"))[:-3])
        assert client.read().status == 404
