"""Cascades: confidence, and folders that combine two stages."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny.files import flip_last_byte

from mlflow_pt_deploy.artifacts import load_variant, verify
from mlflow_pt_deploy.artifacts.cascade_writer import write_cascade
from mlflow_pt_deploy.errors import ArtifactError, UntrustedError, VariantError
from mlflow_pt_deploy.flavor import get_default_pip_requirements
from mlflow_pt_deploy.runtimes.base import confidence
from mlflow_pt_deploy.runtimes.eager import Eager
from mlflow_pt_deploy.runtimes.numpy_static import NumPy
from mlflow_pt_deploy.runtimes.torchscript import TorchScript

ROWS = ("my card", "i want a refund please", "send my money abroad", "hello there", "")


def test_confidence_is_the_largest_probability() -> None:
    logits = np.log(np.array([[0.2, 0.5, 0.3], [0.9, 0.05, 0.05]], dtype=np.float32))
    assert confidence(logits) == pytest.approx([0.5, 0.9])


@pytest.fixture
def stages(exported: Callable[..., Path]) -> tuple[Path, Path]:
    return exported(NumPy(), "static"), exported(Eager())


@pytest.fixture
def threshold(stages: tuple[Path, Path]) -> float:
    """The median confidence of the static student, so that both stages compute some rows."""
    confidences = np.sort(confidence(load_variant(stages[0]).logits(ROWS)))
    return float(confidences[1] + confidences[2]) / 2


def test_rows_below_the_threshold_go_to_the_strong_stage(
    stages: tuple[Path, Path], threshold: float, tmp_path: Path
) -> None:
    write_cascade(tmp_path / "c", *stages, threshold=threshold, golden_rows=ROWS)
    loaded = load_variant(tmp_path / "c", threads=1)
    fast, strong = (load_variant(stage, threads=1).logits(ROWS) for stage in stages)
    unsure = confidence(fast) < threshold
    assert 0 < unsure.sum() < len(ROWS)
    expected = np.where(unsure[:, None], strong, fast)
    assert loaded.logits(ROWS) == pytest.approx(expected, abs=1e-4)
    assert loaded.manifest.name == "cascade-static-teacher"
    assert loaded.manifest.options["threshold"] == threshold
    assert not loaded.manifest.carries_code
    assert loaded.manifest.runtimes == ("numpy", "eager")
    assert any(pin.startswith("torch==") for pin in get_default_pip_requirements("numpy", "eager"))


def test_changed_byte_in_a_stage_is_detected(stages: tuple[Path, Path], tmp_path: Path) -> None:
    write_cascade(tmp_path / "c", *stages, threshold=0.5, golden_rows=ROWS)
    flip_last_byte(tmp_path / "c" / "fast" / "static.safetensors")
    with pytest.raises(ArtifactError, match=r"fast/static\.safetensors is not the file"):
        load_variant(tmp_path / "c")


def test_cascade_with_code_in_a_stage_is_untrusted(
    exported: Callable[..., Path], tmp_path: Path
) -> None:
    fast, strong = exported(NumPy(), "static"), exported(TorchScript())
    manifest = write_cascade(tmp_path / "c", fast, strong, threshold=0.5, golden_rows=ROWS)
    assert manifest.carries_code
    with pytest.raises(UntrustedError, match="carries executable code"):
        load_variant(tmp_path / "c")
    path = tmp_path / "c" / "manifest.json"  # a forged manifest does not help
    content = json.loads(path.read_text(encoding="utf8"))
    content["options"]["trusted"] = False
    path.write_text(json.dumps(content), encoding="utf8")
    with pytest.raises(UntrustedError, match="carries executable code"):
        load_variant(tmp_path / "c")


def test_stages_with_different_labels(stages: tuple[Path, Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(stages[1], other)
    labels = b'["transfer", "refund", "card"]'
    (other / "labels.json").write_bytes(labels)
    path = other / "manifest.json"
    content = json.loads(path.read_text(encoding="utf8"))
    content["files"]["labels.json"] = hashlib.sha256(labels).hexdigest()
    path.write_text(json.dumps(content), encoding="utf8")
    verify(other)
    with pytest.raises(VariantError, match=r"cannot form a cascade: their labels\.json differ"):
        write_cascade(tmp_path / "c", stages[0], other, threshold=0.5, golden_rows=ROWS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]
