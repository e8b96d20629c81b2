"""A portable variant as an MLflow model: environment, promotion, copy, scoring, explanation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
from tiny.gpu import built_for_cuda

from mlflow_pt_deploy import flavor
from mlflow_pt_deploy.artifacts.portable_writer import write_portable
from mlflow_pt_deploy.errors import UntrustedError
from mlflow_pt_deploy.explanation.explainer import Explainer
from mlflow_pt_deploy.explanation.integrated_gradients import METHOD
from mlflow_pt_deploy.pipeline.transfer import copy_champion
from mlflow_pt_deploy.registry.promotion import Candidate, promote
from mlflow_pt_deploy.runtimes import portable
from mlflow_pt_deploy.runtimes.base import Variant
from mlflow_pt_deploy.runtimes.eager import Eager
from mlflow_pt_deploy.runtimes.onnxruntime import OnnxRuntime
from mlflow_pt_deploy.runtimes.torchscript import TorchScript

ROWS = ["please refund me", "my card pin is lost"]


@pytest.fixture
def logged(
    tracking: str,
    exported: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[Variant], str]:
    """Logs a portable variant with this one for the CPU; this host has no GPU."""
    monkeypatch.setattr(portable, "has_cuda", lambda: False)
    cuda = built_for_cuda(exported(Eager("fp16")), tmp_path / "cuda")

    def log(cpu: Variant) -> str:
        write_portable(exported(cpu), cuda, tmp_path / "p")
        with mlflow.start_run():
            return f"models:/{flavor.log_model(tmp_path / 'p', 'portable').model_id}"

    return log


def test_from_the_registry_to_another_and_to_answers(logged: Callable[[Variant], str]) -> None:
    pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
    promote(Candidate(logged(OnnxRuntime()), "reviewed"), "tiny", "reviewed")
    copied = copy_champion("tiny", "other", verify=True)
    loaded = flavor.load_model(copied.uri, num_threads=1)
    assert loaded.manifest.name == "teacher-portable-mixed-cuda"
    assert (loaded.device, loaded.running.runtime) == ("cpu", "onnxruntime")
    model = mlflow.pyfunc.load_model(copied.uri)
    assert [each["label"] for each in model.predict(ROWS)] == ["refund", "card"]


def test_the_environment_is_that_of_both(logged: Callable[[Variant], str]) -> None:
    root = Path(mlflow.artifacts.download_artifacts(logged(OnnxRuntime())))
    pins = (root / "requirements.txt").read_text(encoding="utf8")
    for library in ("onnxruntime==", "torch==", "transformers==", "tokenizers=="):
        assert library in pins


def test_code_in_a_stage_needs_a_promotion(logged: Callable[[Variant], str]) -> None:
    uri = logged(TorchScript())
    with pytest.raises(UntrustedError, match="carries executable code"):
        mlflow.pyfunc.load_model(uri)
    promotion = promote(Candidate(uri, "reviewed"), "tiny", "reviewed")
    assert flavor.load_model(promotion.uri).running.runtime == "torchscript"
    mlflow.pyfunc.load_model(promotion.uri)


def test_gradients_are_those_of_the_stage(logged: Callable[[Variant], str]) -> None:
    pytest.importorskip("captum", reason="the extra `explain` is not installed")
    loaded = flavor.load_model(logged(Eager()))
    explainer = Explainer(loaded, METHOD)
    found = explainer.explain("my card", "card", score=lambda rows: pytest.fail("not needed"))
    assert found["method"] == METHOD
