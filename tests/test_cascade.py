"""Cascades: the plan worked out by hand, and the folder that answers as its two stages would."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mlflow_pt_deploy.artifacts import load_variant, verify
from mlflow_pt_deploy.artifacts.cascade_writer import write_cascade
from mlflow_pt_deploy.errors import ArtifactError, UntrustedError, VariantError
from mlflow_pt_deploy.evaluation import Measurement, Result
from mlflow_pt_deploy.flavor import get_default_pip_requirements
from mlflow_pt_deploy.runtimes.base import confidence
from mlflow_pt_deploy.runtimes.eager import Eager
from mlflow_pt_deploy.runtimes.numpy_static import NumPy
from mlflow_pt_deploy.runtimes.torchscript import TorchScript
from mlflow_pt_deploy.selection.cascade_planner import plan_cascades

ROWS = ("my card", "i want a refund please", "send my money abroad", "hello there", "")


def result(
    variant: str, right: str, sure: tuple[float, ...], speedup: float, reason: str = ""
) -> Result:
    """`right`: a 1 for each of ten validation rows that is answered right, else 0."""
    scores = tuple(map(float, right))
    accuracy = sum(scores) / len(scores)
    model, runtime, precision = variant.split("-", 2)
    measurements = (
        Measurement("speedup", speedup, "x"),
        Measurement("accuracy", accuracy, "fraction", "validation", samples=scores),
        Measurement("accuracy_drop", 0.9 - accuracy, "fraction", "validation"),
        Measurement("confidence", 0.5, "fraction", "validation", samples=sure),
    )
    return Result(
        variant, model, runtime, precision, "cpu", 2, None, reason, measurements=measurements
    )


SURE = (0.99,) * 10
TEACHER = result("teacher-eager-fp32", "1111111110", SURE, 1)
STUDENT = result("student-openvino-fp32", "1111111110", SURE, 10)
# Wrong on rows 0, 2 and 9; least sure of 0, then of 5, then of 2, last of 9.
STATIC = result(
    "static-numpy-fp32",
    "0101111110",
    (0.1, 0.9, 0.4, 0.9, 0.9, 0.2, 0.9, 0.9, 0.9, 0.95),
    100,
)


def test_the_threshold_lies_behind_the_last_row_that_is_needed() -> None:
    plans = plan_cascades([TEACHER, STUDENT, STATIC], retain=0.97)
    # At least 0.873 + 0.002: rows 0, 5 and 2 go to the student, then nine of ten are right.
    assert [(plan.fast, plan.strong) for plan in plans] == [
        ("static-numpy-fp32", "student-openvino-fp32")
    ]
    assert plans[0].threshold == pytest.approx((0.4 + 0.9) / 2)
    assert plans[0].deferral == pytest.approx(0.3)
    assert plans[0].accuracy == pytest.approx(0.9)
    assert plans[0].cost == pytest.approx(1 / 100 + 0.3 / 10)


def test_no_more_is_deferred_than_the_limit_asks_for() -> None:
    (plan,) = plan_cascades([TEACHER, STUDENT, STATIC], retain=0.88)  # 0.792: eight of ten
    assert plan.threshold == pytest.approx((0.1 + 0.2) / 2)
    assert plan.deferral == pytest.approx(0.1)


def test_a_fast_model_within_the_limit_needs_no_cascade() -> None:
    assert plan_cascades([TEACHER, STUDENT, STATIC], retain=0.7) == []


def test_an_accuracy_that_nothing_reaches() -> None:
    assert plan_cascades([TEACHER, STUDENT, STATIC], retain=1.0) == []  # for the margin


def test_a_cascade_slower_than_its_strong_model_is_none() -> None:
    slow = result("static-numpy-fp32", "0101111110", (*[0.9] * 9, 0.95), 11)
    assert plan_cascades([TEACHER, STUDENT, slow], retain=0.97) == []


def test_failed_variants_take_no_part() -> None:
    failed = result("student-openvino-fp32", "1111111110", SURE, 10, reason="no memory")
    (plan,) = plan_cascades([TEACHER, failed, STATIC], retain=0.97)
    assert plan.strong == "teacher-eager-fp32"
    assert plan_cascades([], retain=0.9) == []


def test_confidence_is_the_largest_probability() -> None:
    logits = np.log(np.array([[0.2, 0.5, 0.3], [0.9, 0.05, 0.05]], dtype=np.float32))
    assert confidence(logits) == pytest.approx([0.5, 0.9])


@pytest.fixture
def stages(exported: Callable[..., Path]) -> tuple[Path, Path]:
    return exported(NumPy(), "static"), exported(Eager())


@pytest.fixture
def threshold(stages: tuple[Path, Path]) -> float:
    """In the middle of what the static student says, so that both stages answer some rows."""
    sure = np.sort(confidence(load_variant(stages[0]).logits(ROWS)))
    return float(sure[1] + sure[2]) / 2


def test_each_row_is_answered_by_the_stage_it_belongs_to(
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


def test_a_byte_of_a_stage_that_changed_is_found(stages: tuple[Path, Path], tmp_path: Path) -> None:
    write_cascade(tmp_path / "c", *stages, threshold=0.5, golden_rows=ROWS)
    weights = tmp_path / "c" / "fast" / "static.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"fast/static\.safetensors is not the file"):
        load_variant(tmp_path / "c")


def test_code_in_a_stage_is_code_in_the_cascade(
    exported: Callable[..., Path], tmp_path: Path
) -> None:
    fast, strong = exported(NumPy(), "static"), exported(TorchScript())
    manifest = write_cascade(tmp_path / "c", fast, strong, threshold=0.5, golden_rows=ROWS)
    assert manifest.carries_code
    with pytest.raises(UntrustedError, match="carries executable code"):
        load_variant(tmp_path / "c")
    path = tmp_path / "c" / "manifest.json"  # a liar's manifest does not help
    content = json.loads(path.read_text(encoding="utf8"))
    content["options"]["trusted"] = False
    path.write_text(json.dumps(content), encoding="utf8")
    with pytest.raises(UntrustedError, match="carries executable code"):
        load_variant(tmp_path / "c")


def test_stages_that_disagree_on_labels(stages: tuple[Path, Path], tmp_path: Path) -> None:
    import hashlib

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
