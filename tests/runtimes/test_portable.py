"""Portable variants: one folder for hosts with a GPU and hosts without; one stage is loaded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny.files import flip_last_byte
from tiny.gpu import built_for_cuda, edit_manifest

from mlflow_pt_deploy.artifacts import load_variant, verify
from mlflow_pt_deploy.artifacts.golden import compare_golden_rows, read_golden_rows
from mlflow_pt_deploy.artifacts.loading import _needs_gpu
from mlflow_pt_deploy.artifacts.portable_writer import write_portable
from mlflow_pt_deploy.artifacts.writing import replace_golden_rows
from mlflow_pt_deploy.data import Splits
from mlflow_pt_deploy.errors import (
    ArtifactError,
    PtDeployError,
    UnsupportedError,
    UntrustedError,
    VariantError,
)
from mlflow_pt_deploy.runtimes import portable
from mlflow_pt_deploy.runtimes.eager import Eager
from mlflow_pt_deploy.runtimes.numpy_static import NumPy
from mlflow_pt_deploy.runtimes.onnxruntime import OnnxRuntime
from mlflow_pt_deploy.runtimes.torchscript import TorchScript
from mlflow_pt_deploy.system import device

# Loads a variant where PyTorch cannot be imported; prints the device and a label.
_WITHOUT_TORCH = """\
import sys
from pathlib import Path

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
from mlflow_pt_deploy.artifacts import load_variant
loaded = load_variant(Path(sys.argv[1]))
print(loaded.device, loaded.labels[loaded.logits(["my card"])[0].argmax()])
"""


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portable, "has_cuda", lambda: False)
    monkeypatch.setattr(device, "has_driver", lambda: False)


@pytest.fixture
def cpu_only(without_gpu: None) -> None:
    """The machine has no GPU that PyTorch could use, whatever the functions above say."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")


@pytest.fixture
def pair(exported: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    return exported(Eager()), built_for_cuda(exported(Eager("fp16")), tmp_path / "cuda")


def test_auto_is_the_gpu_where_pytorch_finds_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def found(name: str, answer: bool) -> Callable[[], bool]:
        return lambda: asked.append(name) or answer  # type: ignore[func-returns-value]

    for driver, cuda, expected in [
        (True, True, "cuda"),
        (True, False, "cpu"),
        (False, True, "cpu"),
    ]:
        monkeypatch.setattr(portable, "has_driver", found("driver", driver))
        monkeypatch.setattr(portable, "has_cuda", found("PyTorch", cuda))
        assert portable.usable_device("auto") == expected
    assert asked == ["driver", "PyTorch", "driver", "PyTorch", "driver"]
    assert portable.usable_device("cpu") == "cpu"
    assert portable.usable_device("cuda:1") == "cuda:1"


def test_the_stage_for_the_cpu_runs(
    pair: tuple[Path, Path], tmp_path: Path, tiny_splits: Splits, without_gpu: None
) -> None:
    manifest = write_portable(*pair, tmp_path / "p")
    assert manifest.name == "teacher-portable-mixed-cuda"
    assert (manifest.device, manifest.runtimes) == ("cuda", ("eager", "eager"))
    assert not manifest.carries_code and manifest.cpu_flags == ()
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == [
        "cpu",
        "cuda",
        "labels.json",
        "manifest.json",
        "preprocessor.json",
        "tokenizer.json",
    ]
    rows = tiny_splits.test.rows
    expected = load_variant(pair[0]).logits(rows)
    for name in ("auto", "cpu"):
        loaded = load_variant(tmp_path / "p", device=name)
        assert loaded.device == "cpu"
        assert loaded.manifest.digest == manifest.digest
        assert loaded.running.name == "teacher-eager-fp32"
        np.testing.assert_array_equal(loaded.logits(rows), expected)
    compared = compare_golden_rows(loaded, tmp_path / "p")
    assert compared.equal and compared.changed == 0
    assert compared.allowed < 0.1  # the tolerance of fp32, not that of `mixed`
    assert read_golden_rows(tmp_path / "p") == list(compared.rows)


def test_golden_rows_are_those_of_the_stage(
    pair: tuple[Path, Path], tmp_path: Path, without_gpu: None
) -> None:
    other = Path(shutil.copytree(pair[0], tmp_path / "other"))
    golden = json.loads((other / "golden.json").read_text(encoding="utf8"))
    golden["logits"] = [[value + 1 for value in row] for row in golden["logits"]]
    (other / "golden.json").write_text(json.dumps(golden), encoding="utf8")
    edit_manifest(other, lambda content: None)
    write_portable(other, pair[1], tmp_path / "p")
    with pytest.raises(ArtifactError, match="teacher-eager-fp32 gives other logits"):
        load_variant(tmp_path / "p")


def test_without_pytorch(exported: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
    cuda = built_for_cuda(exported(Eager("fp16")), tmp_path / "cuda")
    manifest = write_portable(exported(OnnxRuntime()), cuda, tmp_path / "p")
    assert manifest.runtimes == ("onnxruntime", "eager")
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_TORCH, str(tmp_path / "p")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "cpu card\n", done.stderr


def test_a_variant_for_gpus_says_what_it_needs(
    pair: tuple[Path, Path], tmp_path: Path, cpu_only: None
) -> None:
    write_portable(*pair, tmp_path / "p")
    message = (
        "teacher-eager-fp16-cuda needs an NVIDIA GPU with its driver, .* it has no NVIDIA driver. "
        "Choose .* pt-deploy promote --run RUN_ID --name NAME --runtimes portable"
    )
    with pytest.raises(UnsupportedError, match=message):
        load_variant(pair[1])
    for name in ("cuda", "cuda:1"):
        with pytest.raises(UnsupportedError, match=message):
            load_variant(tmp_path / "p", device=name)
    assert load_variant(pair[1], device="cpu").device == "cpu"  # eager needs no GPU
    compiled = replace(verify(pair[1]), options={"device": "cuda", "capability": "9.0"})
    error = _needs_gpu(compiled, "PyTorch 2.13.0+cpu finds no CUDA device")
    assert "NVIDIA GPU of compute capability 9.0 with its driver" in str(error)


def test_a_changed_byte_of_the_other_stage_is_detected(
    pair: tuple[Path, Path], tmp_path: Path, without_gpu: None
) -> None:
    write_portable(*pair, tmp_path / "p")
    flip_last_byte(tmp_path / "p" / "cuda" / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"cuda/model\.safetensors is not the file"):
        load_variant(tmp_path / "p")


def test_code_in_one_stage_is_untrusted(
    exported: Callable[..., Path], pair: tuple[Path, Path], tmp_path: Path, without_gpu: None
) -> None:
    manifest = write_portable(exported(TorchScript()), pair[1], tmp_path / "p")
    assert manifest.carries_code
    with pytest.raises(UntrustedError, match="teacher-portable-mixed-cuda .* carries executable"):
        load_variant(tmp_path / "p")
    assert load_variant(tmp_path / "p", allow_code=True).device == "cpu"
    edit_manifest(tmp_path / "p", lambda content: content["options"].update(trusted=False))
    with pytest.raises(UntrustedError, match="teacher-torchscript-fp32"):
        load_variant(tmp_path / "p", allow_code=True)


def test_variants_that_do_not_fit(
    exported: Callable[..., Path], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    target, (cpu, cuda) = tmp_path / "p", pair
    write_portable(cpu, cuda, target)
    before = verify(target).digest
    other = built_for_cuda(exported(NumPy(), "static"), tmp_path / "static")
    labels = Path(shutil.copytree(cuda, tmp_path / "labels"))
    (labels / "labels.json").write_text('["transfer", "refund", "card"]', encoding="utf8")
    edit_manifest(labels, lambda content: None)
    for first, second, message in [
        (cpu, cpu, "teacher-eager-fp32 was built for device=cpu, .* one for device=cuda"),
        (cuda, cpu, "teacher-eager-fp16-cuda was built for device=cuda, .* Give the one for the"),
        (cpu, other, "teacher-eager-fp32 and static-numpy-fp32-cuda .* their models differ"),
        (cpu, labels, r"cannot form a portable variant: their labels\.json differ"),
        (target, cuda, r"teacher-portable-mixed-cuda cannot be a part .* \(portable\)"),
    ]:
        with pytest.raises(VariantError, match=message):
            write_portable(first, second, target)
    assert verify(target).digest == before


@pytest.mark.parametrize("name", ["", "x", "a-unknown-fp32", "a-portable-mixed", "a-cascade-b"])
def test_a_manifest_with_another_stage(
    pair: tuple[Path, Path], tmp_path: Path, without_gpu: None, name: str
) -> None:
    write_portable(*pair, tmp_path / "p")
    edit_manifest(tmp_path / "p", lambda content: content["options"].update(cuda=name))
    with pytest.raises(ArtifactError, match="options contains .* which is not a variant name"):
        load_variant(tmp_path / "p")


def test_golden_rows_can_be_replaced_where_both_stages_run(
    pair: tuple[Path, Path], tmp_path: Path, cpu_only: None
) -> None:
    write_portable(*pair, tmp_path / "p")
    with pytest.raises(PtDeployError, match="teacher-eager-fp16-cuda needs an NVIDIA GPU"):
        replace_golden_rows(tmp_path / "p")


@pytest.mark.gpu
def test_on_a_gpu(exported: Callable[..., Path], tmp_path: Path, tiny_splits: Splits) -> None:
    write_portable(exported(Eager()), exported(Eager("bf16", device="cuda")), tmp_path / "p")
    rows = tiny_splits.test.rows
    expected = load_variant(tmp_path / "p", device="cpu").logits(rows)
    for name, where in (("auto", "cuda"), ("cuda", "cuda"), ("cuda:0", "cuda:0")):
        loaded = load_variant(tmp_path / "p", device=name)  # includes the golden check
        assert loaded.device == where
        assert loaded.running.name == "teacher-eager-bf16-cuda"
        np.testing.assert_allclose(loaded.logits(rows), expected, atol=0.25)
    replace_golden_rows(tmp_path / "p")
    assert read_golden_rows(tmp_path / "p")[0] == "some text"
    assert load_variant(tmp_path / "p").device == "cuda"
