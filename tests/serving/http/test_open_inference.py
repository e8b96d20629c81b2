"""The Open Inference Protocol over REST: tensors, their binary form, pages, wrong requests."""

import base64
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlflow
import pytest
import requests
from conftest import picture
from tiny.server import running
from tiny.serving import save_tiny

from mlflow_pt_deploy._version import __version__
from mlflow_pt_deploy.registry.addresses import ResolvedVersion, source
from mlflow_pt_deploy.serving.app import Application
from mlflow_pt_deploy.serving.http.auth import TokenAuth
from mlflow_pt_deploy.serving.lifecycle.served_model import ServedModel
from mlflow_pt_deploy.serving.lifecycle.version_records import EvictionNote
from mlflow_pt_deploy.serving.model.loaded_model import LoadedModel
from mlflow_pt_deploy.serving.observability.access_log import AccessLog
from mlflow_pt_deploy.serving.observability.prometheus import PrometheusMetrics

SECRET = "zanzibar"
VERSION = "0" * 12
LIMIT = 200_000
TOKEN = "t" * 16
HUGE = 2**62


def served(folder: Path, name: str, **habits: Any) -> ServedModel:
    model = ServedModel(name, source(name))
    saved = save_tiny(folder / name, **habits)
    model.current = LoadedModel(
        mlflow.pyfunc.load_model(str(saved))._model_impl, ResolvedVersion(name)
    )
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ServedModel]:
    folder = tmp_path_factory.mktemp("models")
    return {"tiny": served(folder, "tiny"), "colours": served(folder, "colours", images=True)}


@pytest.fixture(scope="module")
def url(models: dict[str, ServedModel]) -> Iterator[str]:
    with running(Application(models, max_body_bytes=LIMIT)) as found:
        yield found


def tensor(rows: list[Any] | None, **fields: Any) -> dict[str, Any]:
    given = {} if rows is None else {"shape": [len(rows)], "data": rows}
    return {"name": "text", "datatype": "BYTES", **given, **fields}


def infer(
    url: str, body: Any, path: str = "/v2/models/tiny/infer", **headers: str
) -> requests.Response:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return requests.post(url + path, data, headers=names, timeout=10)


def binary(elements: list[bytes], **fields: Any) -> tuple[bytes, int]:
    """A body with binary data, and the length of its JSON."""
    data = b"".join(len(each).to_bytes(4, "little") + each for each in elements)
    given = {"shape": [len(elements)], "parameters": {"binary_data_size": len(data)}}
    head = json.dumps({"inputs": [tensor(None, **(given | fields))]}).encode()
    return head + data, len(head)


def infer_binary(url: str, body: bytes, length: object, **fields: Any) -> requests.Response:
    return infer(url, body, **fields, Inference_Header_Content_Length=str(length))


def output(answer: requests.Response, name: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = {each["name"]: each for each in answer.json()["outputs"]}[name]
    return found


def test_the_answer_is_that_of_invocations_as_tensors(url: str) -> None:
    texts = ["red", "green blue blue", "ünknown"]
    answer = infer(url, {"id": "my id", "inputs": [tensor(texts)]})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-model-version"] == VERSION
    whole = answer.json()
    assert (whole["model_name"], whole["model_version"]) == ("tiny", VERSION)
    assert whole["id"] == "my id"
    plain = requests.post(f"{url}/invocations", json={"inputs": texts}, timeout=10).json()
    assert whole["outputs"] == [
        {"name": name, "shape": [3], "datatype": datatype, "data": [row[name] for row in found]}
        for name, datatype in (("label", "BYTES"), ("score", "FP64"))
        for found in [plain["predictions"]]
    ]
    assert "id" not in infer(url, {"inputs": [tensor(texts)]}).json()


@pytest.mark.parametrize(
    ("top_k", "labels"), [(1, ["red", "blue"]), (2, ["red", "green", "blue", "green"])]
)
def test_top_k_adds_a_dimension(url: str, top_k: int, labels: list[str]) -> None:
    body = {"inputs": [tensor(["red", "green blue blue"])], "parameters": {"top_k": top_k}}
    answer = infer(url, body)
    assert output(answer, "label")["shape"] == output(answer, "score")["shape"] == [2, top_k]
    assert output(answer, "label")["data"] == labels


@pytest.mark.parametrize(
    "given",
    [
        tensor(["red", "blue"]),
        tensor(["red", "blue"], shape=[2, 1]),
        tensor([["red"], ["blue"]], shape=[2, 1]),
        tensor(["red", "blue"], name="input-0"),
        tensor(["red", "blue"], name="INPUT0", parameters={}),
    ],
)
def test_tensors_that_are_understood(url: str, given: dict[str, Any]) -> None:
    answer = infer(url, {"inputs": [given]})
    assert output(answer, "label")["data"] == ["red", "blue"]
    assert output(answer, "label")["shape"] == [2]


def test_only_the_requested_outputs_are_returned(url: str) -> None:
    wanted = [{"name": "score", "parameters": {"binary_data": True}}]
    answer = infer(url, {"inputs": [tensor(["red"])], "outputs": wanted}).json()
    assert [each["name"] for each in answer["outputs"]] == ["score"]
    assert answer["outputs"][0]["data"][0] > 0.5


@pytest.mark.parametrize("media", ["application/octet-stream", "application/json; charset=utf-8"])
def test_binary_texts(url: str, media: str) -> None:
    body, length = binary([b"red", "blue ü".encode(), b""], shape=[3, 1])
    answer = infer_binary(url, body, length, Content_Type=media)
    assert output(answer, "label")["data"] == ["red", "blue", "red"]


def test_a_header_length_without_binary_data(url: str) -> None:
    body = json.dumps({"inputs": [tensor(["red"])]}).encode()
    assert infer_binary(url, body, len(body)).status_code == 200


def test_images_as_base64_and_as_bytes(url: str) -> None:
    files = [picture("RGB", (5, 5), colour) for colour in ((250, 0, 0), (0, 0, 250))]
    path = "/v2/models/colours/infer"
    texts = [base64.b64encode(file).decode() for file in files]
    listed = infer(url, {"inputs": [tensor(texts, name="image")]}, path)
    assert output(listed, "label")["data"] == ["red", "blue"]
    body, length = binary(files, name="image")
    assert infer_binary(url, body, length, path=path).json() == listed.json()
    body, length = binary([SECRET.encode()], name="image")
    assert infer_binary(url, body, length, path=path).status_code == 400


def test_a_long_body_is_parsed_on_a_thread(url: str) -> None:
    words = ["red"] * 500
    answer = infer(url, {"inputs": [tensor([f"{word} " + "x" * 50 for word in words])]})
    assert output(answer, "label")["data"] == words


def wrong_tensors() -> Iterator[tuple[Any, str]]:
    """Input tensors, and what the message says."""
    yield tensor([SECRET], name=SECRET), "must be named 'text'"
    yield tensor([SECRET], name=["text"]), "must be named 'text'"
    yield tensor([SECRET], name="image"), "must be named 'text'"
    yield tensor([1], datatype="INT32"), "must be BYTES"
    yield tensor([SECRET], datatype=None), "must be BYTES"
    yield tensor([SECRET], shape=[2]), "as many elements"
    yield tensor([SECRET], shape=[]), "must be [N] or [N, 1]"
    yield tensor([SECRET], shape=None), "must be [N] or [N, 1]"
    yield tensor([SECRET], shape="1"), "must be [N] or [N, 1]"
    yield tensor([SECRET], shape=[-1]), "must be [N] or [N, 1]"
    yield tensor([SECRET], shape=[1.0]), "must be [N] or [N, 1]"
    yield tensor([SECRET], shape=[True]), "must be [N] or [N, 1]"
    yield tensor([SECRET, "b"], shape=[1, 2]), "must be [N] or [N, 1]"
    yield tensor([SECRET], shape=[1, 1, 1]), "must be [N] or [N, 1]"
    yield tensor([SECRET], shape=[HUGE]), "queue_rows"
    yield tensor([SECRET], shape=[HUGE, 1]), "queue_rows"
    yield tensor([SECRET] * 1025), "queue_rows"
    yield tensor([]), "'text' is empty"
    yield tensor(None, shape=[1]), "'data' of 'text' must be a list"
    yield tensor([SECRET], data=SECRET), "'data' of 'text' must be a list"
    yield tensor([SECRET, None]), "'text' row 1 is null"
    yield tensor([SECRET, 7]), "'text' row 1 is a number"
    yield tensor([[SECRET, "b"]]), "'text' row 0 is a list of 2"
    yield tensor([{"text": SECRET}]), "must hold strings only"
    yield tensor(["x" * 100_001]), "a text may have 100000"
    yield tensor([SECRET], parameters=[]), "'parameters' must be an object"
    yield tensor([SECRET], parameters={"binary_data_size": 3}), "'binary_data_size'"
    yield tensor(None, shape=[1], parameters={"binary_data_size": "3"}), "'binary_data_size'"
    yield SECRET, "'inputs' must be a list of one tensor"


def wrong_bodies() -> Iterator[tuple[Any, str]]:
    """Bodies, and what the message says."""
    good = [tensor([SECRET])]
    yield b"", "not valid JSON"
    yield b"\xff\xfe", "not valid JSON"
    yield b"[" * 10_000, "not valid JSON"
    yield b'{"inputs": ' + b"9" * 5000 + b"}", "not valid JSON"
    yield [good], "'inputs', a list of one tensor"
    yield {"instances": [SECRET]}, "'inputs' must be a list"
    yield {"inputs": SECRET}, "'inputs' must be a list"
    yield {"inputs": []}, "'inputs' has 0 tensors"
    yield {"inputs": good * 2}, "'inputs' has 2 tensors"
    yield {"inputs": good, "parameters": SECRET}, "'parameters' must be an object"
    yield {"inputs": good, "parameters": {"top_k": 9}}, "'top_k'"
    yield {"inputs": good, "id": 7}, "'id' must be a string"
    yield {"inputs": good, "outputs": SECRET}, "'outputs' must be a list"
    yield {"inputs": good, "outputs": [{"name": SECRET}]}, "'outputs' must be a list"
    yield {"inputs": good, "outputs": [{"name": ["label"]}]}, "'outputs' must be a list"
    for each, message in wrong_tensors():
        yield {"inputs": [each]}, message


@pytest.mark.parametrize(("body", "message"), list(wrong_bodies()))
def test_wrong_bodies_are_400_and_nothing_is_repeated(url: str, body: Any, message: str) -> None:
    answer = infer(url, body)
    assert answer.status_code == 400
    assert answer.json().keys() == {"error"}
    assert message in answer.json()["error"]
    assert SECRET not in answer.text


def wrong_binary() -> Iterator[tuple[bytes, object, str]]:
    """Bodies with binary data, values of the header, and what the message says."""
    good, length = binary([SECRET.encode(), b"red"])
    data = good[length:]
    header = "'inference-header-content-length' must be a number of bytes"
    yield good, len(good) + 1, "more than the length of the body"
    yield good, 10**14, "more than the length of the body"
    for value in (-1, "", "1e3", "0x10", "+5", "9" * 30, SECRET):
        yield good, value, header
    yield good, length - 1, "not valid JSON"
    yield good, 0, "not valid JSON"
    yield good, len(good), "not valid JSON"
    yield good[:-1], length, "number of bytes after the JSON"
    yield good + b"x", length, "number of bytes after the JSON"
    listed = json.dumps({"inputs": [tensor(["a"])]}).encode()
    yield listed + data, len(listed), "bytes follow the JSON"
    for size in (-1, 1.5, True, None, "14", HUGE):
        parameters = {"binary_data_size": size}
        body, found = binary([SECRET.encode()], parameters=parameters)
        yield body, found, "bytes follow the JSON" if size is None else "number of bytes"
    body, found = binary([SECRET.encode()], data=[SECRET])
    yield body, found, "instead of 'data'"
    elements = "as many elements as its shape says"
    for count in (1, 3, 1000):
        body, found = binary([SECRET.encode(), b"red"], shape=[count])
        yield body, found, elements
    body, found = binary([SECRET.encode()], shape=[HUGE])
    yield body, found, "queue_rows"
    for torn in (b"\x00\x00", b"\xff\xff\xff\xff" + SECRET.encode(), b"\x05\x00\x00\x00red"):
        head = json.dumps(
            {"inputs": [tensor(None, shape=[1], parameters={"binary_data_size": len(torn)})]}
        ).encode()
        yield head + torn, len(head), elements
    body, found = binary([b"red", b"\xff\xfe" + SECRET.encode()])
    yield body, found, "'text' row 1 is not UTF-8"


@pytest.mark.parametrize(("body", "length", "message"), list(wrong_binary()))
def test_wrong_binary_data_is_400(url: str, body: bytes, length: object, message: str) -> None:
    answer = infer_binary(url, body, length)
    assert answer.status_code == 400
    assert message in answer.json()["error"]
    assert SECRET not in answer.text


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        ({"inputs": [tensor(["red"])]}, {"Content_Type": "text/csv"}, 415),
        ({"inputs": [tensor(["red"])]}, {"Content_Encoding": "gzip"}, 415),
        (b"x" * (LIMIT + 1), {}, 413),
        ({"inputs": [tensor(["red"])]}, {"X_Deadline_Ms": "0"}, 504),
        ({"inputs": [tensor([f"explode {SECRET}"])]}, {}, 500),
    ],
)
def test_other_errors_have_the_form_of_the_protocol(
    url: str, body: Any, headers: dict[str, str], status: int
) -> None:
    answer = infer(url, body, **headers)
    assert answer.status_code == status
    assert answer.json().keys() == {"error"}
    assert SECRET not in answer.text


def test_pages(url: str) -> None:
    def page(path: str) -> Any:
        answer = requests.get(url + path, timeout=5)
        assert answer.status_code == 200
        return answer.json()

    assert page("/v2") == {"name": "pt-deploy", "version": __version__, "extensions": []}
    assert page("/v2/health/live") == {"live": True}
    assert page("/v2/health/ready") == {"ready": True}
    for path in ("/v2/models/tiny", f"/v2/models/tiny/versions/{VERSION}"):
        assert page(f"{path}/ready") == {"name": "tiny", "ready": True}
        about = page(path)
        assert (about["name"], about["versions"]) == ("tiny", [VERSION])
        assert about["inputs"] == [{"name": "text", "datatype": "BYTES", "shape": [-1]}]
        assert [each["name"] for each in about["outputs"]] == ["label", "score"]
        assert infer(url, {"inputs": [tensor(["red"])]}, f"{path}/infer").status_code == 200
    assert page("/v2/models/colours")["inputs"][0]["name"] == "image"


@pytest.mark.parametrize(
    "path",
    [
        "/v2/nothing",
        "/v2/models",
        f"/v2/models/{SECRET}",
        f"/v2/models/{SECRET}/infer",
        f"/v2/models/tiny/versions/{SECRET}",
        f"/v2/models/tiny/versions/{SECRET}/ready",
        f"/v2/models/tiny/versions/{SECRET}/infer",
        "/v2/models/tiny/versions",
        "/v2/models/tiny/versions//infer",
        f"/v2/models/tiny/versions/{VERSION}/{SECRET}",
    ],
)
def test_unknown_models_and_versions_are_404(url: str, path: str) -> None:
    ask = requests.post if path.endswith("infer") else requests.get
    answer = ask(url + path, timeout=5)
    assert answer.status_code == 404
    assert answer.json().keys() == {"error"}
    assert SECRET not in answer.text


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v2/models/tiny/infer", "POST"),
        ("GET", f"/v2/models/tiny/versions/{VERSION}/infer", "POST"),
        ("POST", "/v2/models/tiny", "GET, HEAD"),
        ("POST", "/v2/health/live", "GET, HEAD"),
    ],
)
def test_other_methods_are_405(url: str, method: str, path: str, allowed: str) -> None:
    answer = requests.request(method, url + path, timeout=5)
    assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
    assert answer.json() == {"error": f"this path takes {allowed}"}


def test_a_model_that_is_not_in_memory_is_503() -> None:
    model = ServedModel("tiny", source("tiny"))
    with running(Application({"tiny": model})) as url:
        ready = requests.get(f"{url}/v2/models/tiny/ready", timeout=5)
        assert (ready.status_code, ready.json()) == (503, {"name": "tiny", "ready": False})
        ready = requests.get(f"{url}/v2/health/ready", timeout=5)
        assert (ready.status_code, ready.json()) == (503, {"ready": False})
        about = requests.get(f"{url}/v2/models/tiny", timeout=5)
        assert (about.status_code, about.headers["retry-after"]) == (503, "1")
        assert infer(url, {"inputs": [tensor(["red"])]}).json() == about.json()


def test_an_evicted_model_is_ready_and_loaded_on_demand() -> None:
    model = ServedModel("tiny", source("tiny"))
    model.unloaded = EvictionNote("now", "memory")
    with running(Application({"tiny": model})) as url:
        assert requests.get(f"{url}/v2/models/tiny/ready", timeout=5).json()["ready"]
        ready = requests.get(f"{url}/v2/models/tiny/versions/1/ready", timeout=5)
        assert (ready.status_code, ready.json()["ready"]) == (503, False)
        assert not model.requested_at
        about = requests.get(f"{url}/v2/models/tiny", timeout=5)
        assert (about.status_code, model.requested_at > 0) == (503, True)
        assert "is being loaded" in about.json()["error"]


def test_an_overloaded_model_is_429(
    url: str, models: dict[str, ServedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert models["tiny"].current is not None
    admission = models["tiny"].current.pyfunc.service.batcher.admission
    monkeypatch.setattr(admission, "_queued_rows", lambda: 40)
    monkeypatch.setattr(admission, "_queue_wait_s", lambda: 9.0)
    answer = infer(url, b"x" * 50_000)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
    assert "estimated wait 9000 ms" in answer.json()["error"]


def test_probes_need_no_token_and_everything_is_counted_and_logged(
    models: dict[str, ServedModel], caplog: pytest.LogCaptureFixture
) -> None:
    metrics = PrometheusMetrics()
    application = Application(
        models, metrics=metrics, auth=TokenAuth((TOKEN.encode(),)), access_log=AccessLog()
    )
    caplog.set_level(logging.INFO, "mlflow_pt_deploy.access")
    paths = ["/v2", "/v2/models/tiny", f"/v2/models/tiny/versions/{VERSION}"]
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    with running(application) as url:
        for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/tiny/ready"):
            assert requests.get(url + path, timeout=5).status_code == 200
        for path in paths:
            refused = requests.get(url + path, timeout=5)
            assert (refused.status_code, list(refused.json())) == (401, ["error"])
            assert requests.get(url + path, headers=bearer, timeout=5).status_code == 200
        body = {"inputs": [tensor(["red"])]}
        assert infer(url, body).status_code == 401
        for version, status in ((VERSION, 200), (SECRET, 404)):
            path = f"/v2/models/tiny/versions/{version}/infer"
            answer = infer(url, body, path, **bearer, X_Request_Id="my-id")
            assert (answer.status_code, answer.headers["x-request-id"]) == (status, "my-id")
    text = metrics.expose() or b""
    for status, version in ((200, VERSION), (401, ""), (404, "")):
        labels = f'model="tiny",status="{status}",version="{version}"'
        assert f"pt_deploy_requests_total{{{labels}}} 1.0".encode() in text
    written = [record.getMessage() for record in caplog.records]
    assert written.count("/v2/models/tiny/infer 200") == 1
    assert not any("health" in line or SECRET in line for line in written)
