"""The flavor: save, log and load variants with MLflow."""

from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient
from tiny.files import flip_last_byte

from mlflow_pt_deploy import flavor
from mlflow_pt_deploy.artifacts import load_variant, write_variant
from mlflow_pt_deploy.data import Splits
from mlflow_pt_deploy.errors import ArtifactError, ServingError, UntrustedError
from mlflow_pt_deploy.models import load_classifier
from mlflow_pt_deploy.registry.addresses import DIGEST_TAG
from mlflow_pt_deploy.registry.promotion import Candidate, promote
from mlflow_pt_deploy.runtimes.base import Variant
from mlflow_pt_deploy.runtimes.eager import Eager
from mlflow_pt_deploy.runtimes.onnxruntime import OnnxRuntime
from mlflow_pt_deploy.runtimes.torchscript import TorchScript

ROWS = ["please refund me", "my card pin is lost"]


def _variant(variant: Variant, tiny_model: Path, splits: Splits, folder: Path) -> Path:
    module = load_classifier(str(tiny_model))
    target = folder / variant.name("teacher")
    example = module.preprocessor(["a card", "a refund please for my card"])
    rows = splits.validation.rows[:2]
    write_variant(variant, module, target, model="teacher", example=example, golden_rows=rows)
    return target


def _logged(folder: Path) -> str:
    with mlflow.start_run():
        return f"models:/{flavor.log_model(folder, folder.name).model_id}"


def test_an_onnx_variant_also_has_the_onnx_flavor(
    tracking: str, tiny_model: Path, tiny_splits: Splits, tmp_path: Path
) -> None:
    folder = _variant(OnnxRuntime("fp32"), tiny_model, tiny_splits, tmp_path)
    uri = _logged(folder)
    native = mlflow.onnx.load_model(uri)
    assert {value.name for value in native.graph.input} == {"input_ids", "attention_mask"}
    loaded = flavor.load_model(uri, num_threads=1)
    expected = load_variant(folder).logits(ROWS)
    np.testing.assert_allclose(loaded.logits(ROWS), expected, atol=1e-5)
    predictions = mlflow.pyfunc.load_model(uri).predict(ROWS)
    assert [prediction["label"] for prediction in predictions] == [
        loaded.labels[row] for row in expected.argmax(axis=1)
    ]


def test_the_requirements_match_the_runtime(
    tracking: str, tiny_model: Path, tiny_splits: Splits, tmp_path: Path
) -> None:
    folder = _variant(OnnxRuntime("fp32"), tiny_model, tiny_splits, tmp_path)
    flavor.save_model(folder, tmp_path / "model")
    text = (tmp_path / "model" / "requirements.txt").read_text()
    assert "onnxruntime==" in text
    assert "torch" not in text
    assert "mlflow-pt-deploy==" in text


def test_a_flipped_byte_is_rejected(
    tracking: str, tiny_model: Path, tiny_splits: Splits, tmp_path: Path
) -> None:
    folder = _variant(Eager("fp32"), tiny_model, tiny_splits, tmp_path)
    flavor.save_model(folder, tmp_path / "model")
    flip_last_byte(tmp_path / "model" / "variant" / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"model.safetensors is not the file that was exported"):
        mlflow.pyfunc.load_model(str(tmp_path / "model"))


def test_code_is_loaded_only_if_allowed_or_promoted(
    tracking: str,
    tiny_model: Path,
    tiny_splits: Splits,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uri = _logged(_variant(TorchScript("fp32"), tiny_model, tiny_splits, tmp_path))
    with pytest.raises(UntrustedError, match="carries executable code"):
        mlflow.pyfunc.load_model(uri)
    mlflow.pyfunc.load_model(uri, model_config={"allow_code": True})
    monkeypatch.setenv(flavor.ALLOW_CODE_ENV, "1")
    mlflow.pyfunc.load_model(uri)
    monkeypatch.delenv(flavor.ALLOW_CODE_ENV)
    promotion = promote(Candidate(uri, "reviewed"), "tiny", "reviewed")
    mlflow.pyfunc.load_model(promotion.uri)
    client = MlflowClient()
    client.set_model_version_tag("tiny", promotion.version, DIGEST_TAG, "0" * 64)
    with pytest.raises(UntrustedError, match="carries executable code"):
        mlflow.pyfunc.load_model(promotion.uri)


def test_logged_serving_options_are_used(
    tracking: str, tiny_model: Path, tiny_splits: Splits, tmp_path: Path
) -> None:
    folder = _variant(OnnxRuntime("fp32"), tiny_model, tiny_splits, tmp_path)
    best = {"num_threads": 1, "max_batch_rows": 128}
    with mlflow.start_run():
        info = flavor.log_model(folder, folder.name, model_config=best)
    served = mlflow.pyfunc.load_model(f"models:/{info.model_id}")._model_impl.options
    assert (served.num_threads, served.max_batch_rows, served.queue_rows) == (1, 128, 1024)
    with pytest.raises(ServingError, match="model_config: num_threads must be"):
        flavor.save_model(folder, tmp_path / "model", model_config={"num_threads": "many"})
