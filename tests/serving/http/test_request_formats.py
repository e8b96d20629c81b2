"""Rows of a request in every format: our server, MLflow's own server, and Python."""

import json
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pyarrow as pa  # type: ignore[import-untyped]
import pytest
import requests
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PyFuncModel, scoring_server
from tiny.server import running
from tiny.serving import save_tiny

from mlflow_pt_deploy.registry.addresses import ResolvedVersion, source
from mlflow_pt_deploy.serving.app import Application
from mlflow_pt_deploy.serving.http.csv_parser import parse_csv
from mlflow_pt_deploy.serving.lifecycle.served_model import ServedModel
from mlflow_pt_deploy.serving.model.loaded_model import LoadedModel

JSON, CSV, PARQUET = scoring_server.CONTENT_TYPES[1], "text/csv", "application/vnd.apache.parquet"
SECRET = "zanzibar"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PyFuncModel:
    folder: Path = save_tiny(tmp_path_factory.mktemp("model") / "tiny")
    return mlflow.pyfunc.load_model(str(folder))


def encoded(body: Any) -> bytes:
    if isinstance(body, bytes):
        return body
    return (body if isinstance(body, str) else json.dumps(body)).encode()


def stock(model: PyFuncModel, body: Any, media: str) -> Any:
    """The response of ``mlflow models serve``."""
    schema = model.metadata.get_input_schema()
    return json.loads(scoring_server.invocations(encoded(body), media, model, schema).response)


@pytest.fixture(scope="module")
def url(model: PyFuncModel) -> Iterator[str]:
    served = ServedModel("tiny", source("tiny"))
    served.current = LoadedModel(model._model_impl, ResolvedVersion("tiny"))
    with running(Application({"tiny": served})) as found:
        yield found


def ours(url: str, body: Any, media: str) -> requests.Response:
    """The response of the application."""
    headers = {"Content-Type": media}
    return requests.post(f"{url}/invocations", encoded(body), headers=headers, timeout=30)


def labels(answers: Any) -> list[str]:
    return [row["label"] for row in answers]


def parquet(**columns: list[str]) -> bytes:
    buffer = BytesIO()
    pd.DataFrame(columns).to_parquet(buffer)
    return buffer.getvalue()


PAIRED = [
    ({"inputs": {"text": ["red"], "text_pair": [SECRET]}}, JSON, "'text' and 'text_pair'"),
    ({"inputs": [{"text": "red", "hypothesis": SECRET}]}, JSON, "'text' and 'hypothesis'"),
    ({"instances": [{"sentence1": "red", "sentence2": SECRET}]}, JSON, "'sentence1' and 'sent"),
    ({"inputs": [{"text": "red"}, {"text": "red", "context": SECRET}]}, JSON, "'text' and 'con"),
    (
        {"dataframe_split": {"columns": ["premise", "hypothesis"], "data": [["red", SECRET]]}},
        JSON,
        "'premise' and 'hypothesis' are several texts per row",
    ),
    ({"dataframe_split": {"data": [["red", SECRET]]}}, JSON, "2 columns without the name 'text'"),
    ({"dataframe_records": [{"text": "red", "textPair": SECRET}]}, JSON, "'text' and 'textPair'"),
    ({"inputs": [["red", SECRET]]}, JSON, "pairs are not supported"),
    (f"text,text2\nred,{SECRET}\n", CSV, "'text' and 'text2' are several texts per row"),
    (f"question,text\nred,{SECRET}\n", CSV, "'question' and 'text' are several"),
    (parquet(text=["red"], text_pair=[SECRET]), PARQUET, "'text' and 'text_pair' are several"),
]
"""Requests with two texts a row, and the error for each."""


@pytest.mark.parametrize(("body", "media", "message"), PAIRED)
def test_two_texts_a_row_are_refused(
    model: PyFuncModel, body: Any, media: str, message: str
) -> None:
    with pytest.raises(MlflowException) as info:
        stock(model, body, media)
    assert info.value.get_http_status_code() == 400
    error = info.value.serialize_as_json()
    assert message in error and "pairs are not supported" in error
    assert SECRET not in error


BESIDE = [
    ({"inputs": ["red"], "text_pair": [SECRET]}, JSON, "'text' and 'text_pair' are several"),
    ({"inputs": ["red"], "params": {"hypothesis": SECRET}}, JSON, "'text' and 'hypothesis' are"),
]
"""MLflow's own server drops these before the model gets them."""


@pytest.mark.parametrize(("body", "media", "message"), PAIRED + BESIDE)
def test_our_server_refuses_pairs_too(url: str, body: Any, media: str, message: str) -> None:
    response = ours(url, body, media)
    assert response.status_code == 400
    error = response.json()["message"]
    assert message in error and "pairs are not supported" in error
    assert SECRET not in response.text


@pytest.mark.parametrize(
    "data",
    [
        pd.DataFrame([["red", "x"]], columns=["text", "text"]),
        pd.DataFrame([["red", "x"]]),
        pd.DataFrame([["red", "x"]], columns=["0", "1"]),  # Spark's names
        {"text": ["red"], "query": ["x"]},
        [("red", "x")],
        [["red", "x"]],
        np.array([["red", "x"]]),
        pd.Series([["red", "x"]]),
        pa.table({"text": ["red"], "passage": ["x"]}),
    ],
    ids=lambda data: type(data).__name__,
)
def test_two_texts_a_row_are_refused_in_python(model: PyFuncModel, data: Any) -> None:
    with pytest.raises(MlflowException, match="pairs are not supported") as info:
        model.predict(data)
    assert info.value.get_http_status_code() == 400


@pytest.mark.parametrize(
    "data",
    [
        "red",
        np.str_("red"),
        np.array("red"),
        ("red",),
        [("red",)],
        (text for text in ["red"]),
        iter(["red"]),
        {"text": "red"},
        pd.Series([["red"]]),
        pd.Index(["red"]),
        pa.table({"text": ["red"], "id": [1]}),
        pd.DataFrame({"feature_1": ["red"]}),
    ],
    ids=lambda data: type(data).__name__,
)
def test_one_row_in_other_wrappings(model: PyFuncModel, data: Any) -> None:
    assert labels(model.predict(data)) == ["red"]


WORDS = ["123", "001", "TRUE", "None", "NA", "null", "n/a", "inf", "1e5", "2020-01-01", "red, blue"]


@pytest.mark.parametrize("rows", [[word] for word in WORDS] + [[*WORDS, "shoe"]], ids=str)
def test_a_csv_cell_is_read_as_text(url: str, rows: list[str]) -> None:
    body = "id,text\n" + "".join(f'1,"{row}"\n' for row in rows)
    assert parse_csv(body.encode(), "text", 99) == rows
    plain = "\ufefftext\r\n\r\n" + "".join(f"{row}\r\n" for row in rows if "," not in row)
    expected = [row for row in rows if "," not in row]
    assert parse_csv(plain.encode(), "text", 99) == expected
    assert ours(url, body, CSV).status_code == 200


def test_an_empty_text_of_a_csv_is_a_row(url: str) -> None:
    assert parse_csv(b'text\n""\nred\n\n', "text", 99) == ["", "red"]
    assert len(ours(url, 'text\n""\nred\n', CSV).json()["predictions"]) == 2


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("text,id\nred\n", "line 2 of the CSV has 1 cell and its header 2"),
        ("text;id\nred;1\n", "'text' is missing; write the names of the columns into the first"),
        ('text\n"red\n', "quotes do not match near line"),
        ("text\n", "'text' is empty"),
        ("", "'text' is empty"),
    ],
)
def test_a_csv_that_does_not_fit(url: str, body: str, message: str) -> None:
    response = ours(url, body, CSV)
    assert response.status_code == 400
    assert message in response.json()["message"]


@pytest.mark.parametrize("row", ["123", "TRUE", "NA", "1e5"])
def test_mlflows_own_server_infers_types_and_the_error_says_so(
    model: PyFuncModel, row: str
) -> None:
    with pytest.raises(MlflowException, match="it was read with type inference"):
        stock(model, f"text\n{row}\n", CSV)
