"""Images on their way to the model: MLflow's server, ours, and a notebook."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import requests
from conftest import picture
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PyFuncModel, scoring_server
from tiny.server import running
from tiny.serving import save_tiny

from mlflow_pt_deploy.registry.addresses import ResolvedVersion, source
from mlflow_pt_deploy.serving.app import Application
from mlflow_pt_deploy.serving.lifecycle.served_model import ServedModel
from mlflow_pt_deploy.serving.model.loaded_model import LoadedModel

JSON, CSV, PARQUET = scoring_server.CONTENT_TYPES[1], "text/csv", "application/vnd.apache.parquet"
SECRET = "zanzibar"
RED = picture("RGB", (40, 30), (250, 10, 10), "JPEG")
BLUE = picture("RGBA", (3, 50), (0, 0, 255, 255))


def text(file: bytes) -> str:
    return base64.b64encode(file).decode()


R, B = text(RED), text(BLUE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny", images=True)


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[PyFuncModel]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "true")
        yield mlflow.pyfunc.load_model(str(folder), model_config={"queue_rows": 600})


@pytest.fixture(scope="module")
def ours(model: PyFuncModel) -> Iterator[str]:
    served = ServedModel("tiny", source("tiny"))
    served.current = LoadedModel(model._model_impl, ResolvedVersion("tiny"))
    served.current.pyfunc.warm_up()
    with running(Application({"tiny": served}, max_body_bytes=100_000)) as url:
        yield url


def stock(model: PyFuncModel, body: Any, media: str = JSON) -> Any:
    """Answer one body exactly as ``mlflow models serve`` does."""
    body = json.dumps(body) if isinstance(body, dict) else body
    body = body.encode() if isinstance(body, str) else body
    schema = model.metadata.get_input_schema()
    return json.loads(scoring_server.invocations(body, media, model, schema).response)


def post(url: str, body: Any, media: str = JSON) -> requests.Response:
    data = json.dumps(body) if isinstance(body, dict) else body
    headers = {"Content-Type": media}
    return requests.post(f"{url}/invocations", data=data, headers=headers, timeout=10)


def labels(answer: Any) -> list[str]:
    return [row["label"] for row in answer]


def parquet(**columns: list[Any]) -> bytes:
    buffer = BytesIO()
    pd.DataFrame(columns).to_parquet(buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("body", "media"),
    [
        ({"inputs": [R, B]}, JSON),
        ({"inputs": {"image": [R, B]}}, JSON),
        ({"instances": [{"image": R}, {"image": B}]}, JSON),
        ({"dataframe_split": {"columns": ["id", "image"], "data": [[1, R], [2, B]]}}, JSON),
        ({"dataframe_records": [{"image": R}, {"image": B}]}, JSON),
        # as MLflow itself writes a binary column
        ({"inputs": [base64.encodebytes(it).decode() for it in (RED, BLUE)]}, JSON),
        ({"inputs": [f"data:image/jpeg;base64,{R}", f"data:image/png;base64,{B}"]}, JSON),
        (f"image\n{R}\n{B}\n", CSV),
        (parquet(image=[RED, BLUE], other=["x", "y"]), PARQUET),
        (parquet(image=[R, B]), PARQUET),
    ],
)
def test_every_format_of_mlflow_is_understood(
    model: PyFuncModel, ours: str, body: Any, media: str
) -> None:
    assert labels(stock(model, body, media)["predictions"]) == ["red", "blue"]
    answer = post(ours, body, media)
    assert answer.status_code == 200
    assert labels(answer.json()["predictions"]) == ["red", "blue"]


@pytest.mark.parametrize(
    "data",
    [
        [RED, BLUE],
        [R, B],
        (bytearray(RED), memoryview(BLUE)),
        np.array([RED, BLUE], dtype=object),
        pd.Series([RED, BLUE]),
        pd.DataFrame({"id": [1, 2], "image": [RED, BLUE]}),
        [{"image": RED}, {"image": BLUE}],
        {"image": [RED, BLUE]},
    ],
    ids=lambda data: type(data).__name__,
)
def test_predict_takes_lists_arrays_and_tables(model: PyFuncModel, data: Any) -> None:
    assert labels(model.predict(data)) == ["red", "blue"]


def test_a_single_image_is_a_row(model: PyFuncModel) -> None:
    assert labels(model.predict(RED)) == labels(model.predict(R)) == ["red"]


def test_many_images_are_read_in_slices_and_named_by_their_number(model: PyFuncModel) -> None:
    small = text(picture("RGB", (2, 2), (0, 0, 255)))
    assert labels(model.predict([*[small] * 300, R])) == ["blue"] * 300 + ["red"]
    with pytest.raises(MlflowException, match="'image' row 300 is not an image of a supported"):
        model.predict([*[small] * 300, text(b"x")])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"inputs": []}, "'image' is empty"),
        ({"inputs": [R, None]}, "'image' row 1 is null"),
        ({"inputs": [7]}, "'image' row 0 is a number"),
        ({"dataframe_records": [{"image": [0, 9]}]}, "'image' row 0 is a list; every row must be"),
        ({"inputs": [R, f"{SECRET}!"]}, "'image' row 1 is a text that is not base64"),
        ({"inputs": [R, "café"]}, "'image' row 1 is a text that is not base64"),
        ({"inputs": [R, ""]}, "'image' row 1 is not an image of a supported format; use one"),
        ({"inputs": [R, text(SECRET.encode())]}, "'image' row 1 is not an image of a supported"),
        ({"inputs": [R, text(RED[:-30])]}, "'image' row 1 is a damaged or truncated image"),
        (
            {"inputs": [R, text(picture("1", (6100, 6100), 0))]},
            "'image' row 1 has 37,210,000 pixels; the limit is 36,000,000",
        ),
        ({"inputs": {"text": [SECRET]}}, "the column 'image' is missing"),
        ({"dataframe_split": {"columns": [SECRET], "data": [[R]]}}, "column 'image' is missing"),
    ],
)
def test_a_wrong_image_is_400_and_not_repeated(
    model: PyFuncModel, ours: str, body: Any, message: str
) -> None:
    with pytest.raises(MlflowException) as info:
        stock(model, body)
    assert info.value.get_http_status_code() == 400
    answer = post(ours, body)
    assert answer.status_code == 400
    for said in (info.value.serialize_as_json(), answer.text):
        assert message in json.loads(said)["message"]
        assert SECRET not in said and R not in said


def test_equal_images_in_one_request_and_a_long_body(ours: str) -> None:
    assert post(ours, {"inputs": [R] * 9, "params": {"top_k": 2}}).status_code == 200
    assert post(ours, {"inputs": [R * 200]}).status_code == 413
