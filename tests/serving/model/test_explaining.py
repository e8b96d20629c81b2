"""Explanations over HTTP, and of MLflow's `predict`."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
import requests
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PyFuncModel, scoring_server
from tiny.artifact import edit_mlmodel
from tiny.server import running
from tiny.serving import predict as tiny_predict
from tiny.serving import save_tiny, tiny_variant

from mlflow_pt_deploy.artifacts import load_variant
from mlflow_pt_deploy.errors import DeadlineError, OverloadedError, ServingError, UnsupportedError
from mlflow_pt_deploy.registry.addresses import ResolvedVersion, source
from mlflow_pt_deploy.runtimes.base import Inputs, Logits
from mlflow_pt_deploy.serving.app import Application
from mlflow_pt_deploy.serving.batching.request import RequestContext
from mlflow_pt_deploy.serving.lifecycle.served_model import ServedModel
from mlflow_pt_deploy.serving.model.explaining import MAX_PENDING, MAX_ROWS, ExplanationThreads
from mlflow_pt_deploy.serving.model.loaded_model import LoadedModel
from mlflow_pt_deploy.serving.model.pyfunc import PtDeployPyFunc

SECRET = "zanzibar"
TEXT = f"{SECRET} red, é😀 red green"
# a word adds 1 to the logit of its label, and so 1/3 to the mean of the three labels
OWN, OTHER = 0.666667, -0.333333
SHARES = [("zanzibar", 0), ("red", OWN), (",", 0), ("é", 0), ("😀", 0), ("red", OWN)]
SHARES += [("green", OTHER)]
JSON, CSV, PARQUET = "application/json", "text/csv", "application/vnd.apache.parquet"
EXPLAIN = {"explain": True}
SAVED = Path(__file__).parents[2] / "fixtures" / "saved-by-0.1.0"
WAYS = ("inline", "batcher")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PyFuncModel:
    return mlflow.pyfunc.load_model(str(save_tiny(tmp_path_factory.mktemp("model") / "tiny")))


@pytest.fixture(scope="module")
def url(model: PyFuncModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of the tiny model of texts, and of one of images."""
    folder = save_tiny(tmp_path_factory.mktemp("images") / "tiny", images=True)
    images = mlflow.pyfunc.load_model(str(folder))
    models = {}
    for name, each in (("tiny", model), ("images", images)):
        models[name] = ServedModel(name, source(name))
        models[name].current = LoadedModel(each._model_impl, ResolvedVersion(name))
    with running(Application(models)) as found:
        yield found


def post(url: str, body: Any, media: str = JSON, **headers: str) -> requests.Response:
    data = json.dumps(body) if isinstance(body, dict) else body
    return requests.post(url, data=data, headers={"Content-Type": media} | headers, timeout=20)


def shares(prediction: Any, text: str = TEXT) -> list[tuple[str, float]]:
    found = prediction["explanation"]["contributions"]
    return [(text[each["start"] : each["end"]], each["value"]) for each in found]


def parquet(**columns: list[str]) -> bytes:
    buffer = BytesIO()
    pd.DataFrame(columns).to_parquet(buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("path", ["/explain", "/models/tiny/explain", "/invocations"])
@pytest.mark.parametrize("way", WAYS)
def test_a_prediction_has_its_explanation(
    url: str, model: PyFuncModel, path: str, way: str
) -> None:
    model._model_impl.service.runs_inline = way == "inline"
    params = EXPLAIN if path == "/invocations" else None
    answer = post(url + path, {"inputs": ["blue", TEXT], "params": params})
    assert answer.status_code == 200
    first, second = answer.json()["predictions"]
    assert (first["label"], second["label"]) == ("blue", "red")
    assert shares(first, "blue") == [("blue", OWN)]
    assert shares(second) == SHARES
    contributions = second["explanation"].pop("contributions")
    assert second["explanation"] == {
        "method": "occlusion",
        "label": "red",
        "logit": 1,
        "base": 0,
        "delta": 0,
        "truncated": False,
    }
    assert contributions[1] == {"start": 9, "end": 12, "value": OWN}


def test_predictions_are_those_without_explanation(url: str) -> None:
    body = {"inputs": ["red", "red green", ""]}
    plain = post(f"{url}/invocations", body).json()["predictions"]
    explained = post(f"{url}/explain", body).json()["predictions"]
    for each in explained:
        del each["explanation"]
    assert explained == plain
    off = post(f"{url}/invocations", body | {"params": {"explain": False}})
    assert off.json()["predictions"] == plain


def test_of_several_labels_the_best_is_explained(url: str) -> None:
    body = {"inputs": ["green"], "params": {"top_k": 2, "explain": True}}
    first, second = post(f"{url}/invocations", body).json()["predictions"][0]
    assert first["explanation"]["label"] == first["label"] == "green"
    assert "explanation" not in second


@pytest.mark.parametrize(
    ("body", "media"),
    [
        (f'text\n"{TEXT}"\n', CSV),
        (parquet(text=[TEXT], other=["x"]), PARQUET),
        ({"dataframe_records": [{"text": TEXT}]}, JSON),
        ({"dataframe_split": {"columns": ["text"], "data": [[TEXT]]}}, JSON),
    ],
)
def test_explain_reads_every_format(url: str, body: Any, media: str) -> None:
    body = body.encode() if isinstance(body, str) else body
    answer = post(f"{url}/explain", body, media)
    assert shares(answer.json()["predictions"][0]) == SHARES


def test_empty_and_truncated_texts(url: str) -> None:
    empty, long = post(f"{url}/explain", {"inputs": ["", "red " * 99]}).json()["predictions"]
    assert empty["explanation"]["contributions"] == []
    assert not empty["explanation"]["truncated"]
    assert len(long["explanation"]["contributions"]) == 64
    assert long["explanation"]["truncated"]


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/invocations", {"inputs": [SECRET], "params": {"explain": 1}}, "true or false"),
        ("/invocations", {"inputs": [SECRET], "params": {"explain": SECRET}}, "true or false"),
        ("/invocations", {"inputs": [SECRET], "params": {"explain": [True]}}, "true or false"),
        ("/explain", {"inputs": [SECRET], "params": {"explain": "no"}}, "true or false"),
        ("/explain", {"inputs": [SECRET] * (MAX_ROWS + 1)}, "9 rows; .* may have 8"),
        ("/explain", {"inputs": []}, "'text' is empty"),
        ("/explain", {"inputs": [7]}, "'text' row 0 is a number"),
        ("/explain", {"inputs": [SECRET], "params": {"top_k": 0}}, "'top_k'"),
        ("/models/images/explain", {"inputs": ["AAAA"]}, "this model reads images"),
        ("/models/images/invocations", {"inputs": ["AAAA"], "params": EXPLAIN}, "reads images"),
    ],
)
def test_bad_requests_are_refused(url: str, path: str, body: Any, message: str) -> None:
    answer = post(url + path, body)
    assert answer.status_code == 400
    assert re.search(message, answer.json()["message"]), answer.text
    assert SECRET not in answer.text


def test_only_post_is_allowed(url: str) -> None:
    assert requests.get(f"{url}/explain", timeout=5).status_code == 405
    assert post(f"{url}/models/nothing/explain", {"inputs": ["red"]}).status_code == 404


def test_the_open_inference_protocol_has_no_explanations(url: str) -> None:
    tensor = {"name": "text", "datatype": "BYTES", "shape": [1], "data": [SECRET]}
    wanted = {"inputs": [tensor], "parameters": EXPLAIN}
    answer = post(f"{url}/v2/models/tiny/infer", wanted)
    assert answer.status_code == 400
    assert "/models/NAME/explain" in answer.json()["error"]
    wanted["parameters"] = {"explain": False}
    assert post(f"{url}/v2/models/tiny/infer", wanted).status_code == 200


def test_a_row_that_fails_without_a_word_is_an_error_of_the_model(url: str) -> None:
    answer = post(f"{url}/explain", {"inputs": [f"explode {SECRET}"]})
    assert answer.status_code == 500
    assert SECRET not in answer.text


def test_paths_are_in_the_openapi_document(url: str) -> None:
    document = requests.get(f"{url}/openapi.json", timeout=5).json()
    assert {"/explain", "/models/tiny/explain"} <= document["paths"].keys()
    schema = document["components"]["schemas"]["Explanation"]
    found = post(f"{url}/explain", {"inputs": ["red"]}).json()["predictions"][0]["explanation"]
    assert set(schema["required"]) == found.keys()


def test_rows_of_explanations_are_not_counted_as_answered(url: str, model: PyFuncModel) -> None:
    counts = model._model_impl.service.counts
    before = counts.rows
    post(f"{url}/explain", {"inputs": [TEXT]})
    assert counts.rows == before + 1


def test_latencies_of_explanations_are_not_those_of_the_version(model: PyFuncModel) -> None:
    served = ServedModel("tiny", source("tiny"))
    version = served.current = LoadedModel(model._model_impl, ResolvedVersion("tiny"))
    with running(Application({"tiny": served})) as own:
        post(f"{own}/explain", {"inputs": [TEXT]})
        assert len(version.seconds) == 0
        post(f"{own}/invocations", {"inputs": [TEXT]})
        assert len(version.seconds) == 1


def slow_pyfunc(seconds: float, **config: Any) -> PtDeployPyFunc:
    """The tiny model; a batch of several rows takes a while."""

    def predict(inputs: Inputs) -> Logits:
        if len(inputs["input_ids"]) > 1:
            time.sleep(seconds)
        return tiny_predict(inputs)

    return PtDeployPyFunc(replace(tiny_variant(), predict=predict), config)  # type: ignore[arg-type]


def ask_slow(pyfunc: PtDeployPyFunc, act: Callable[[str], Any]) -> Any:
    served = ServedModel("slow", source("slow"))
    served.current = LoadedModel(pyfunc, ResolvedVersion("slow"))
    with running(Application({"slow": served})) as url:
        return act(url)


def test_an_explanation_ends_at_the_deadline() -> None:
    pyfunc = slow_pyfunc(0.3, max_batch_rows=2)
    start = time.monotonic()
    body = {"inputs": ["red " * 30]}
    answer = ask_slow(pyfunc, lambda url: post(f"{url}/explain", body, **{"X-Deadline-Ms": "200"}))
    assert answer.status_code == 504
    assert time.monotonic() - start < 3


def test_other_requests_pass_between_the_batches_of_an_explanation() -> None:
    pyfunc = slow_pyfunc(0.02, max_batch_rows=2, deadline_ms=60_000)
    done: list[str] = []

    def explain(url: str) -> None:
        assert post(f"{url}/explain", {"inputs": ["red " * 60]}).status_code == 200
        done.append("explanation")

    def act(url: str) -> None:
        thread = threading.Thread(target=explain, args=(url,))
        thread.start()
        for _ in range(3):
            assert post(f"{url}/invocations", {"inputs": ["green"]}).status_code == 200
            done.append("row")
        thread.join()

    ask_slow(pyfunc, act)
    assert done == ["row", "row", "row", "explanation"]


def test_more_than_a_few_pending_explanations_are_rejected() -> None:
    pyfunc = slow_pyfunc(0.05)
    threads = ExplanationThreads()

    async def ask() -> Sequence[Any]:
        prediction = ['{"label": "red", "score": 1}']
        waiting = [
            threads.explain(pyfunc.explainer, ["red green"], prediction, RequestContext())
            for _ in range(MAX_PENDING + 1)
        ]
        return await asyncio.gather(*waiting, return_exceptions=True)

    *explained, rejected = asyncio.run(ask())
    threads.close()
    assert isinstance(rejected, OverloadedError)
    assert all("contributions" in each[0] for each in explained)


def test_an_abandoned_explanation_stops() -> None:
    context = RequestContext()
    context.disconnected = True
    with pytest.raises(DeadlineError):
        slow_pyfunc(0).explainer.explain(["red"], [{"label": "red"}], context)


def test_mlflow_predicts_with_explanations(model: PyFuncModel) -> None:
    (found,) = model.predict([TEXT], params=EXPLAIN)
    assert shares(found) == SHARES
    assert len(model.predict(["red"] * 20, params=EXPLAIN)) == 20
    assert "explanation" not in model.predict([TEXT])[0]


def test_mlflows_server_explains_and_has_the_limits(
    model: PyFuncModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "true")
    schema = model.metadata.get_input_schema()

    def stock(rows: list[str]) -> Any:
        body = json.dumps({"inputs": rows, "params": EXPLAIN}).encode()
        return json.loads(scoring_server.invocations(body, JSON, model, schema).response)

    assert shares(stock([TEXT])["predictions"][0]) == SHARES
    with pytest.raises(MlflowException, match="a request with explanations may have 8"):
        stock(["red"] * 9)


def test_mlflow_refuses_what_is_no_boolean(model: PyFuncModel) -> None:
    with pytest.raises(MlflowException, match=r"[Ii]ncompatible.*explain|explain"):
        model.predict(["red"], params={"explain": "yes"})
    with pytest.raises(MlflowException, match="'explain' must be true or false"):
        model._model_impl.predict(["red"], {"explain": "yes"})


def test_the_signature_of_an_older_model_drops_the_parameter(tmp_path: Path) -> None:
    """MLflow ignores parameters that a signature lacks; our server does not ask the signature."""
    folder = save_tiny(tmp_path / "model")
    params = '[{"name": "top_k", "default": 1, "shape": null, "type": "long"}]'
    edit_mlmodel(folder, lambda content: content["signature"].update(params=params))
    old = mlflow.pyfunc.load_model(str(folder))
    assert "explanation" not in old.predict([TEXT], params=EXPLAIN)[0]
    assert shares(old._model_impl.predict([TEXT], EXPLAIN)[0]) == SHARES


def test_a_method_that_is_not_possible_stops_the_load() -> None:
    with pytest.raises(UnsupportedError, match="has no gradients"):
        PtDeployPyFunc(load_variant(SAVED / "variant"), {"explain_method": "integrated_gradients"})
    with pytest.raises(ServingError, match="explain_method must be one of auto, integrated_grad"):
        PtDeployPyFunc(load_variant(SAVED / "variant"), {"explain_method": "best"})
