"""The pyfunc as MLflow really loads and calls it."""

import json
import os
import threading
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PyFuncModel, scoring_server
from tiny.serving import predict as tiny_predict
from tiny.serving import save_tiny, tiny_variant

from mlflow_pt_deploy.errors import ServingError
from mlflow_pt_deploy.model_config import MODEL_CONFIG, ServingOptions
from mlflow_pt_deploy.serving.model.pyfunc import PtDeployPyFunc

JSON, CSV, PARQUET = scoring_server.CONTENT_TYPES[1], "text/csv", "application/vnd.apache.parquet"
SECRET = "zanzibar"
SERVING = "_MLFLOW_IS_IN_SERVING_ENVIRONMENT"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def model(folder: Path) -> PyFuncModel:
    return mlflow.pyfunc.load_model(str(folder))


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What MLflow's scoring server sets."""
    monkeypatch.setenv(SERVING, "true")
    yield


def stock(model: PyFuncModel, body: Any, media: str = JSON) -> Any:
    """Answer one body exactly as ``mlflow models serve`` does."""
    if isinstance(body, dict):
        body = json.dumps(body)
    body = body.encode() if isinstance(body, str) else body
    schema = model.metadata.get_input_schema()
    return json.loads(scoring_server.invocations(body, media, model, schema).response)


def labels(answer: Any) -> list[str]:
    return [row["label"] for row in answer]


def parquet(**columns: list[str]) -> bytes:
    buffer = BytesIO()
    pd.DataFrame(columns).to_parquet(buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("body", "media"),
    [
        ({"inputs": ["red", "blue blue"]}, JSON),
        ({"inputs": {"text": ["red", "blue"]}}, JSON),
        ({"inputs": [["red"], ["blue"]]}, JSON),
        ({"instances": ["red", "blue"]}, JSON),
        ({"instances": [{"text": "red"}, {"text": "blue"}]}, JSON),
        ({"dataframe_split": {"columns": ["text"], "data": [["red"], ["blue"]]}}, JSON),
        ({"dataframe_split": {"data": [["red"], ["blue"]]}}, JSON),
        ({"dataframe_records": [{"text": "red", "id": 1}, {"text": "blue", "id": 2}]}, JSON),
        ("text\nred\nblue\n", CSV),
        (parquet(text=["red", "blue"], other=["x", "y"]), PARQUET),
    ],
)
def test_every_format_of_mlflow_is_understood(model: PyFuncModel, body: Any, media: str) -> None:
    assert labels(stock(model, body, media)["predictions"]) == ["red", "blue"]


@pytest.mark.parametrize("body", [{"inputs": "green"}, {"inputs": {"text": "green"}}])
def test_a_single_text_is_a_row(model: PyFuncModel, body: Any) -> None:
    assert labels(stock(model, body)["predictions"]) == ["green"]


@pytest.mark.parametrize(
    "data",
    [
        ["red", "blue"],
        ("red", "blue"),
        np.array(["red", "blue"]),
        np.array([["red"], ["blue"]], dtype=object),
        pd.Series(["red", "blue"]),
        pd.Series(["red", "blue"], index=[7, 9], name="other"),
        pd.DataFrame({"id": [1, 2], "text": ["red", "blue"]}),
        pd.DataFrame(["red", "blue"]),
        {"text": ["red", "blue"]},
        [{"text": "red"}, {"text": "blue"}],
    ],
    ids=lambda data: type(data).__name__,
)
def test_predict_takes_lists_arrays_and_tables(model: PyFuncModel, data: Any) -> None:
    assert labels(model.predict(data)) == ["red", "blue"]


def test_one_string_in_one_answer_out(model: PyFuncModel) -> None:
    # e / (e + 2): one logit of 1 among two of 0
    assert model.predict("red") == [{"label": "red", "score": 0.576117}]


def test_top_k_gives_a_list_a_row_best_first(model: PyFuncModel) -> None:
    answer = stock(model, {"inputs": ["blue red blue", "red"], "params": {"top_k": 2}})
    assert [labels(row) for row in answer["predictions"]] == [["blue", "red"], ["red", "green"]]


@pytest.mark.parametrize("top_k", [0, 4, -1])
def test_top_k_out_of_range_is_refused(model: PyFuncModel, top_k: int) -> None:
    with pytest.raises(MlflowException, match="'top_k' must be a whole number from 1 to 3") as info:
        model.predict(["red"], params={"top_k": top_k})
    assert info.value.get_http_status_code() == 400


@pytest.mark.parametrize("top_k", ["2", 1.5, True, [1]])
def test_top_k_of_a_wrong_type_is_refused(top_k: Any) -> None:
    with pytest.raises(MlflowException, match="'top_k' must be a whole number"):
        PtDeployPyFunc(tiny_variant()).predict(["red"], {"top_k": top_k})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("body", "media", "message"),
    [
        ({"inputs": []}, JSON, "'text' is empty"),
        ({"dataframe_records": []}, JSON, "'text' is empty"),
        ({"inputs": [SECRET, None]}, JSON, "'text' row 1 is null"),
        ({"dataframe_records": [{"text": SECRET}, {"text": None}]}, JSON, "'text' row 1 is null"),
        ({"inputs": None}, JSON, "'text' row 0 is null"),
        ({"inputs": [1, 2]}, JSON, "'text' row 0 is a number"),
        ({"inputs": {"text": {SECRET: "red"}}}, JSON, "'text' row 0 is an object"),
        ({"inputs": {"txet": [SECRET]}}, JSON, "column 'text' is missing"),
        ({"dataframe_records": [{"txet": SECRET}]}, JSON, "column 'text' is missing"),
        ({"inputs": [["red", SECRET]]}, JSON, "flat list"),
        ("12\n13\n", CSV, "column 'text' is missing"),
        (parquet(**{SECRET: ["red"]}), PARQUET, "column 'text' is missing"),
    ],
)
def test_a_wrong_request_is_400_and_not_repeated(
    model: PyFuncModel, serving: None, body: Any, media: str, message: str
) -> None:
    with pytest.raises(MlflowException) as info:
        stock(model, body, media)
    answer = info.value.serialize_as_json()
    assert message in answer
    assert info.value.get_http_status_code() == 400
    assert SECRET not in answer


@pytest.mark.parametrize("word", ["explode", "nan"])
def test_a_fault_of_the_model_is_500_and_says_nothing(
    model: PyFuncModel, word: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(MlflowException) as info:
        stock(model, {"inputs": [f"{word} {SECRET}"]})
    assert info.value.get_http_status_code() == 500
    body = json.loads(info.value.serialize_as_json())
    assert body.keys() == {"error_code", "message"}
    assert not any(word in str(body) for word in (SECRET, "Traceback", "secret", "/path"))
    assert "the model failed" in caplog.text


def test_a_request_of_too_many_rows_is_refused_where_served(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mlflow.pyfunc.load_model(str(folder), model_config={"queue_rows": 3})
    assert len(model.predict(["red"] * 9000)) == 9000
    monkeypatch.setenv(SERVING, "true")
    with pytest.raises(MlflowException, match=r"'text' has 4 rows.* 3 \(queue_rows\)") as info:
        model.predict(["red"] * 4)
    assert info.value.get_http_status_code() == 400


def test_overload_is_429_and_a_missed_deadline_504(serving: None) -> None:
    variant = tiny_variant()
    gate, entered = threading.Event(), threading.Event()

    def slow(inputs: Any) -> Any:
        entered.set()
        assert gate.wait(10)
        return tiny_predict(inputs)

    object.__setattr__(variant, "predict", slow)
    model = PtDeployPyFunc(variant, {"queue_rows": 1, "deadline_ms": 150})  # type: ignore[arg-type]
    errors: list[MlflowException] = []

    def call(color: str) -> None:
        try:
            model.predict([color])
        except MlflowException as error:
            errors.append(error)

    first = threading.Thread(target=call, args=["red"])
    first.start()
    assert entered.wait(5)
    others = [threading.Thread(target=call, args=[color]) for color in ("green", "blue")]
    for thread in others:
        thread.start()
    for thread in others:
        thread.join()
    gate.set()
    first.join()
    assert [error.get_http_status_code() for error in errors] == [429, 504]


def test_options_are_checked_by_name() -> None:
    defaults = ServingOptions()
    assert ServingOptions.from_config({}) == ServingOptions.from_config(MODEL_CONFIG) == defaults
    for key, value in [
        ("max_batch_rows", 0),
        ("queue_rows", 1.5),
        ("num_threads", -1),
        ("deadline_ms", "soon"),
        ("max_wait_ms", float("nan")),
        ("allow_code", "yes"),
        ("device", ""),
    ]:
        with pytest.raises(ServingError, match=f"model_config: {key} must be "):
            ServingOptions.from_config({key: value})
    with pytest.raises(ServingError, match="model_config has no threads; it has max_batch_rows"):
        ServingOptions.from_config({"threads": 1})


def test_the_tests_do_not_leak_the_serving_environment() -> None:
    assert SERVING not in os.environ


def test_a_row_without_device_memory_is_503(tmp_path: Path) -> None:
    model = mlflow.pyfunc.load_model(str(save_tiny(tmp_path / "tiny", full_on="slow")))
    assert model.predict(["red"])[0]["label"] == "red"
    with pytest.raises(MlflowException, match="a row needs more memory") as info:
        model.predict(["red", "slow"])
    assert info.value.get_http_status_code() == 503
    assert "secret" not in str(info.value)
