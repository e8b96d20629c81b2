"""Linear layers quantized by torchao; on the CPU it has int8 products, and emulates none of fp8."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mlflow_pt_deploy.artifacts import load_variant
from mlflow_pt_deploy.data import Splits
from mlflow_pt_deploy.errors import MissingExtraError, VariantError
from mlflow_pt_deploy.models import Classifier, load_classifier
from mlflow_pt_deploy.runtimes.catalog import skip_reason
from mlflow_pt_deploy.runtimes.torchao import TorchAO
from mlflow_pt_deploy.training.inference import predict_logits


@pytest.fixture
def classifier(tiny_model: Path) -> Classifier:
    return load_classifier(str(tiny_model))


def test_int8_variant(
    exported: Callable[..., Path], tiny_splits: Splits, classifier: Classifier
) -> None:
    pytest.importorskip("torchao", reason="needs the extra quantize", exc_type=ImportError)
    folder = exported(TorchAO("int8-dynamic"))
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    loaded = load_variant(folder, threads=1)
    rows = tiny_splits.test.rows
    error = loaded.logits(rows) - predict_logits(classifier, rows)
    assert 1e-3 < np.abs(error).max() < 0.15 * 5
    head = loaded.predict.module.network.classifier  # 3 classes
    assert type(head.weight.data).__name__ == "Tensor"


def test_missing_library_names_its_extra(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(MissingExtraError, match=r"torchao is not installed.*\[quantize\]"):
        TorchAO("int8-dynamic").load(tiny_model, device="cpu", threads=1)


def test_a_convolutional_network_is_refused(tiny_resnet: Path, tmp_path: Path) -> None:
    module = load_classifier(str(tiny_resnet))
    with pytest.raises(VariantError, match="weight matrices are fp8 after quantization"):
        TorchAO("fp8-dynamic").export(module, {}, [], tmp_path)
    assert skip_reason(TorchAO("fp8-dynamic", device="cuda"), "resnet")
