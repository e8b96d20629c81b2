"""Tools of MLflow with pt_deploy models, called as in the documentation of MLflow."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature, get_model_info, make_metric, set_signature
from mlflow.pyfunc.scoring_server import invocations
from mlflow.types import ColSpec, Schema
from tiny.artifact import SAVED
from tiny.serving import save_tiny, tiny_variant

from mlflow_pt_deploy import flavor
from mlflow_pt_deploy.serving.model.outputs import PredictionFormatter, Predictions
from mlflow_pt_deploy.serving.model.pyfunc import PtDeployPyFunc

# MLflow 3.17 uses features of pandas 3 that pandas 4 removes.
pytestmark = pytest.mark.filterwarnings("ignore::pandas.errors.Pandas4Warning")

FRAME = pd.DataFrame(
    {
        "text": ["red", "blue red blue", "green", "red"],
        "shop": ["x", "y", "x", "y"],
        "y": ["red", "blue", "green", "blue"],
    }
)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.mark.parametrize("more", [{}, {"predictions": "label"}], ids=str)
def test_evaluate_a_classifier(tracking: str, uri: str, more: dict[str, Any]) -> None:
    done = mlflow.models.evaluate(uri, FRAME, targets="y", model_type="classifier", **more)
    assert done.metrics["accuracy_score"] == 0.75
    assert done.metrics["example_count"] == 4
    assert {"per_class_metrics", "confusion_matrix"} <= done.artifacts.keys()


def test_evaluate_with_a_custom_metric(tracking: str, uri: str) -> None:
    def correct(predictions: Any, targets: Any) -> float:
        return float((predictions == targets).mean())

    metric = make_metric(eval_fn=correct, greater_is_better=True, name="correct")
    rows = np.array([[text] for text in FRAME["text"]], dtype=object)
    targets = np.array(FRAME["y"].tolist(), dtype=object)
    done = mlflow.models.evaluate(
        uri, rows, targets=targets, model_type="classifier", extra_metrics=[metric]
    )
    assert done.metrics["correct"] == done.metrics["accuracy_score"] == 0.75
    by_name = mlflow.models.evaluate(
        uri, FRAME, targets="y", predictions="label", extra_metrics=[metric]
    )
    assert by_name.metrics["correct"] == 0.75


@pytest.mark.filterwarnings("ignore:Hint. Inferred schema contains integer:UserWarning")
@pytest.mark.parametrize(
    ("names", "targets"),
    [(("0", "1", "2"), [0, 1, 2, 1]), (("True", "False", "TRUE"), [True, False, True, False])],
)
def test_evaluate_on_labels_that_pandas_reads_as_numbers(
    tracking: str, uri: str, names: tuple[str, ...], targets: list[Any]
) -> None:
    model = mlflow.pyfunc.load_model(uri)
    model._model_impl.service.formatter = PredictionFormatter(names)
    frame = pd.DataFrame({"text": ["red", "green", "blue", "green"], "y": targets})
    done = mlflow.models.evaluate(
        model,
        frame,
        targets="y",
        model_type="classifier",
        evaluator_config={"log_model_explainability": False},
    )
    assert done.metrics["accuracy_score"] == 1


def test_predictions_are_a_list_of_dicts_and_an_array_of_labels() -> None:
    predictions = PtDeployPyFunc(tiny_variant()).predict(["red", "blue"])  # type: ignore[arg-type]
    expected = [{"label": "red", "score": 0.576117}, {"label": "blue", "score": 0.576117}]
    assert isinstance(predictions, Predictions) and predictions == expected
    assert json.loads(json.dumps(predictions)) == expected
    assert pd.DataFrame(predictions).to_dict("records") == expected
    again = copy.deepcopy(predictions)
    assert again == expected and np.asarray(again).tolist() == ["red", "blue"]
    assert PtDeployPyFunc(tiny_variant()).predict(["red"], {"top_k": 2})[0][0] == expected[0]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("names", "values"),
    [
        (("0", "1"), [0, 1]),
        (("-1", "10"), [-1, 10]),
        (("00", "1"), ["00", "1"]),
        (("0", "x"), ["0", "x"]),
        (("false", "TRUE"), [False, True]),
        (("false", "0"), ["false", "0"]),
    ],
)
def test_the_array_has_the_types_that_pandas_reads(
    names: tuple[str, str], values: list[Any]
) -> None:
    predictions = PredictionFormatter(names).as_predictions([{"label": name} for name in names])
    assert np.array(predictions).tolist() == values


@pytest.mark.parametrize(
    ("data", "media"),
    [
        (FRAME[["text"]], "csv"),
        (FRAME[["text", "shop"]], "json"),
        (FRAME["text"].tolist(), "json"),
        ({"text": FRAME["text"].tolist()}, "json"),
        ("text\nred\nblue red blue\ngreen\nred\n", "csv"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 5 else type(value).__name__,
)
def test_predict_with_mlflow_models(uri: str, tmp_path: Path, data: Any, media: str) -> None:
    output = tmp_path / "answer.json"
    mlflow.models.predict(
        uri, input_data=data, content_type=media, env_manager="local", output_path=str(output)
    )
    predictions = json.loads(output.read_text())["predictions"]
    assert [prediction["label"] for prediction in predictions] == ["red", "blue", "green", "red"]


@pytest.mark.parametrize("text", ["123", "NA"])
def test_a_csv_with_guessed_types_is_rejected(uri: str, text: str) -> None:
    with pytest.raises(MlflowException, match="was read with type inference.*or send JSON"):
        mlflow.models.predict(
            uri, input_data=f"text\n{text}\n", content_type="csv", env_manager="local"
        )


def test_why_the_signature_declares_no_inputs(tmp_path: Path) -> None:
    """If this fails, MLflow's enforcement has changed: then `pyfunc.signature` may declare them."""
    folder = save_tiny(tmp_path / "tiny")
    pair = pd.DataFrame({"text": ["red"], "text_pair": ["blue"]})
    with pytest.raises(MlflowException, match="several texts per row"):
        mlflow.pyfunc.load_model(str(folder)).predict(pair)
    model = Model.load(str(folder))
    assert model.signature is not None
    model.signature = ModelSignature(Schema([ColSpec("string", "text")]), model.signature.outputs)
    model.save(str(folder / "MLmodel"))
    declared = mlflow.pyfunc.load_model(str(folder))
    assert declared.predict(pair)[0]["label"] == "red"  # the second text is dropped in silence
    for data in (["red"], "red", pd.Series(["red"])):
        with pytest.raises(MlflowException, match="Failed to enforce schema"):
            declared.predict(data)


DECLARED = Schema([ColSpec("string", "text")])
SENT: dict[str, Any] = {
    "inputs": {"inputs": ["red", "blue"]},
    "one": {"inputs": "red"},
    "null": {"inputs": ["red", None]},
    "instances": {"instances": ["red", "blue"]},
    "split": {"dataframe_split": {"columns": ["text"], "data": [["red"], ["blue"]]}},
    "records": {"dataframe_records": [{"text": "red"}, {"text": "blue"}]},
}


def declare(folder: Path, type_hint: bool = False) -> mlflow.pyfunc.PyFuncModel:
    """Set the signature as the documentation of the format shows, and load the model."""
    before = get_model_info(str(folder)).signature
    declared = ModelSignature(DECLARED, before.outputs, before.params)
    declared._is_signature_from_type_hint = type_hint
    set_signature(str(folder), declared)
    return mlflow.pyfunc.load_model(str(folder))


def answered(model: mlflow.pyfunc.PyFuncModel, sent: dict[str, Any]) -> bool:
    """Whether MLflow's own server reads a body."""
    body = json.dumps(sent).encode()
    try:
        answer = invocations(body, "application/json", model, model.metadata.get_input_schema())
    except MlflowException:
        return False
    return json.loads(answer.response)["predictions"][0]["label"] == "red"


def test_no_signature_reads_every_format(tmp_path: Path) -> None:
    """If this fails, MLflow has changed, and `pyfunc.signature` may declare inputs."""
    nothing = mlflow.pyfunc.load_model(str(save_tiny(tmp_path / "nothing")))
    column = declare(save_tiny(tmp_path / "column"))
    hint = declare(save_tiny(tmp_path / "hint"), type_hint=True)
    read = {
        name: [answered(model, sent) for model in (nothing, column, hint)]
        for name, sent in SENT.items()
    }
    assert read == {
        "inputs": [True, True, True],
        "one": [True, False, True],
        "null": [False, True, False],
        "instances": [True, True, False],
        "split": [True, True, False],
        "records": [True, True, False],
    }


def test_a_declared_column_loads_in_our_server_too(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(SAVED, tmp_path / "saved"))
    declare(folder)
    assert flavor.load_model(str(folder)).manifest.model == "student"
