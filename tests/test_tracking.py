"""Models logged to MLflow are downloaded to a local folder."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.models.model import ModelInfo

from mlflow_pt_deploy import flavor
from mlflow_pt_deploy.config import Options
from mlflow_pt_deploy.data import load_data
from mlflow_pt_deploy.errors import ModelError
from mlflow_pt_deploy.models import load_classifier, new_classifier
from mlflow_pt_deploy.pipeline.stages import train_teacher
from mlflow_pt_deploy.runtimes.base import Variant
from mlflow_pt_deploy.runtimes.eager import Eager
from mlflow_pt_deploy.runtimes.torchscript import TorchScript
from mlflow_pt_deploy.tracking import _log_input, dataset, fetch_model, log_folder

ROWS = ("please refund me", "my card pin", "send it abroad")


def _logits(folder: Path | str) -> np.ndarray:
    import torch

    classifier = load_classifier(str(folder))
    inputs = classifier.preprocessor(ROWS)
    with torch.inference_mode():
        output = classifier(*(torch.from_numpy(inputs[name]) for name in inputs))
    return output.numpy()


def _files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def _log(model: Any, **options: Any) -> ModelInfo:
    """`mlflow.transformers.log_model` in a run of its own; guessing requirements takes seconds."""
    with mlflow.start_run():
        return mlflow.transformers.log_model(
            model, name="spam", pip_requirements=["transformers"], **options
        )


@pytest.fixture
def parts(tiny_model: Path) -> dict[str, Any]:
    """Network and tokenizer of `tiny_model`, as a user of transformers has them."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    return {
        "model": AutoModelForSequenceClassification.from_pretrained(tiny_model),
        "tokenizer": AutoTokenizer.from_pretrained(tiny_model),
    }


@pytest.fixture
def pipeline(tracking: str, parts: dict[str, Any]) -> ModelInfo:
    """A text-classification pipeline logged by MLflow's own flavor."""
    from transformers import pipeline

    return _log(pipeline("text-classification", **parts))


@pytest.mark.parametrize("kind", ["run", "logged model", "version", "alias"])
def test_a_pipeline_by_each_address(pipeline: ModelInfo, tiny_model: Path, kind: str) -> None:
    mlflow.register_model(pipeline.model_uri, "spam")
    MlflowClient().set_registered_model_alias("spam", "champion", "1")
    reference = {
        "run": f"runs:/{pipeline.run_id}/spam",
        "logged model": pipeline.model_uri,
        "version": "models:/spam/1",
        "alias": "models:/spam@champion",
    }[kind]
    folder = fetch_model(reference)
    np.testing.assert_array_equal(_logits(folder), _logits(tiny_model))
    assert load_classifier(folder).labels == ("card", "refund", "transfer")


def test_a_dict_of_components(tracking: str, parts: dict[str, Any], tiny_model: Path) -> None:
    info = _log(parts, task="text-classification")
    np.testing.assert_array_equal(_logits(fetch_model(info.model_uri)), _logits(tiny_model))


def test_the_model_of_a_stage(tracking: str, tiny_model: Path) -> None:
    with mlflow.start_run():
        address = log_folder(tiny_model, "model")
    np.testing.assert_array_equal(_logits(fetch_model(address)), _logits(tiny_model))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_eager_variant(
    tracking: str, exported: Callable[[Variant], Path], tiny_model: Path, precision: str
) -> None:
    with mlflow.start_run():
        info = flavor.log_model(exported(Eager(precision=precision)), "teacher-eager")
    # Weights are kept as fp32; the bf16 variant casts them when it is loaded.
    np.testing.assert_array_equal(_logits(fetch_model(info.model_uri)), _logits(tiny_model))


def test_a_variant_of_another_runtime_is_rejected(
    tracking: str, exported: Callable[[Variant], Path]
) -> None:
    with mlflow.start_run():
        info = flavor.log_model(exported(TorchScript()), "teacher-torchscript")
    with pytest.raises(ModelError, match=r"contains no Hugging Face model.* Give .* an eager fp32"):
        fetch_model(info.model_uri)


def test_references_outside_of_mlflow_are_returned_unchanged() -> None:
    for reference in ("minilm", "org/model", "some/folder"):
        assert fetch_model(reference) == reference


def test_the_artifact_store_is_not_changed(pipeline: ModelInfo, tmp_path: Path) -> None:
    mlflow.register_model(pipeline.model_uri, "spam")
    before = _files(tmp_path / "artifacts")
    for reference in (f"runs:/{pipeline.run_id}/spam", "models:/spam/1", pipeline.model_uri):
        first, second = fetch_model(reference), fetch_model(reference)
        assert first != second, "two callers share a folder"
    assert _files(tmp_path / "artifacts") == before


def test_copies_are_removed_at_the_end_of_the_process(pipeline: ModelInfo, tmp_path: Path) -> None:
    mlflow.register_model(pipeline.model_uri, "spam")
    references = [f"runs:/{pipeline.run_id}/spam", "models:/spam/1", "runs:/none/spam"]
    code = (
        "import os, sys\n"
        "from mlflow_pt_deploy.tracking import ModelError, fetch_model\n"
        "for reference in sys.argv[1:]:\n"
        "    try: print(os.listdir(fetch_model(reference)))\n"
        "    except ModelError: print('none')\n"
    )
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code, *references],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(scratch)},
    )
    lines = done.stdout.splitlines()
    assert [("model.safetensors" in line) for line in lines] == [True, True, False]
    assert not list(scratch.iterdir())


def test_a_model_of_another_library(tracking: str) -> None:
    from sklearn.dummy import DummyClassifier

    with mlflow.start_run():
        info = mlflow.sklearn.log_model(
            DummyClassifier().fit([[0.0]], [0]), name="dummy", pip_requirements=["scikit-learn"]
        )
    with pytest.raises(
        ModelError, match="contains no Hugging Face model, but one of sklearn; only single-label"
    ):
        fetch_model(info.model_uri)


def test_a_model_of_another_task_can_be_fine_tuned(tracking: str, parts: dict[str, Any]) -> None:
    from transformers import BertForMaskedLM, pipeline

    network = BertForMaskedLM(parts["model"].config)
    info = _log(pipeline("fill-mask", model=network, tokenizer=parts["tokenizer"]))
    folder = fetch_model(f"runs:/{info.run_id}/spam")
    with pytest.raises(ModelError, match=f"runs-{info.run_id}-spam.* not trained as a classifier"):
        load_classifier(folder)
    classifier = new_classifier(folder, ("yes", "no"))
    expected = network.bert.embeddings.word_embeddings.weight.detach().numpy()
    found = classifier.network.bert.embeddings.word_embeddings.weight.detach().numpy()
    np.testing.assert_array_equal(found, expected)


def test_an_adapter_beside_its_base(tracking: str, tiny_model: Path, tmp_path: Path) -> None:
    """In the layout of the MLflow flavor; otherwise only the base model would be optimized."""
    logged = tmp_path / "logged"
    shutil.copytree(tiny_model, logged / "model")
    (logged / "peft").mkdir()
    (logged / "peft" / "adapter_config.json").write_text("{}")
    with mlflow.start_run():
        address = log_folder(logged, "spam")
    with pytest.raises(ModelError, match=r"is a PEFT adapter .* merge_and_unload"):
        fetch_model(address)


@pytest.mark.parametrize(
    "reference",
    ["runs:/0123/model", "runs:/", "models:/nothing/1", "models:/nothing@champion", "models:/m-1"],
)
def test_references_unknown_to_mlflow(tracking: str, reference: str) -> None:
    with pytest.raises(ModelError, match=f"{reference} cannot be fetched from MLflow. Check it"):
        fetch_model(reference)


def test_a_missing_artifact(pipeline: ModelInfo) -> None:
    with pytest.raises(ModelError, match=r"MLFLOW_TRACKING_URI \(sqlite:///.*mlflow.db\)"):
        fetch_model(f"runs:/{pipeline.run_id}/other")


def test_a_stage_starts_from_a_logged_model(
    pipeline: ModelInfo, tiny_data: Path, tiny_model: Path
) -> None:
    teacher = f"runs:/{pipeline.run_id}/spam"
    trained = train_teacher(Options(data=str(tiny_data), teacher=teacher, epochs=0))
    assert trained.validation_accuracy > 0.9
    np.testing.assert_array_equal(_logits(fetch_model(trained.model)), _logits(tiny_model))


def test_a_dataset_that_another_process_stores_at_once(
    tracking: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow looks a dataset up and then inserts it; the second process gets an error."""
    monkeypatch.setattr("mlflow_pt_deploy.tracking._INPUT_PAUSE_S", 0.01)
    real, calls = mlflow.log_input, []

    def log_input(*args: object, **more: object) -> None:
        calls.append(args)
        if len(calls) in (1, 4, 5, 6):
            raise RuntimeError("UNIQUE constraint failed: datasets.experiment_id")
        real(*args, **more)

    monkeypatch.setattr(mlflow, "log_input", log_input)
    splits = load_data("catalog", limit=20)
    with mlflow.start_run() as run:
        _log_input(dataset(splits, "train"), "train")
        with pytest.raises(RuntimeError, match="UNIQUE"):
            for _ in range(2):
                _log_input(dataset(splits, "test"), "test")
    inputs = MlflowClient().get_run(run.info.run_id).inputs.dataset_inputs
    assert sorted(each.dataset.name for each in inputs) == ["catalog-test", "catalog-train"]


def test_the_device_of_a_run(tracking: str, tiny_data: Path, tiny_model: Path) -> None:
    from mlflow_pt_deploy.tracking import log_device

    teacher = str(tiny_model)
    done = train_teacher(Options(data=str(tiny_data), teacher=teacher, epochs=0, device="cpu"))
    assert mlflow.get_run(done.run_id).data.params["device"] == "cpu"
    with mlflow.start_run() as run:
        mlflow.log_param("device", "auto")  # as `mlflow run` does
        for _ in range(2):
            log_device(mlflow.get_run(run.info.run_id), "cpu")
    params = mlflow.get_run(run.info.run_id).data.params
    assert params == {"device": "auto", "resolved_device": "cpu"}
