"""Only a complete, unchanged and supported variant folder is loaded."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mlflow_pt_deploy.artifacts import load_variant, read_manifest, verify
from mlflow_pt_deploy.errors import (
    ArtifactError,
    DeviceMemoryError,
    UnsupportedError,
    UntrustedError,
)
from mlflow_pt_deploy.runtimes.base import Inputs, Logits, Predict, Variant
from mlflow_pt_deploy.runtimes.device_memory import DeviceMemoryGuard
from mlflow_pt_deploy.runtimes.eager import Eager
from mlflow_pt_deploy.runtimes.onnxruntime import OnnxRuntime
from mlflow_pt_deploy.runtimes.torchscript import TorchScript

NAME = "teacher-eager-fp32"
FILES = (
    "config.json",
    "golden.json",
    "labels.json",
    "model.safetensors",
    "preprocessor.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


@pytest.fixture
def folder(eager_variant: Path, tmp_path: Path) -> Path:
    """A copy to modify."""
    return Path(shutil.copytree(eager_variant, tmp_path / NAME))


def edit_manifest(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf8")) | changes))


def test_the_manifest_describes_the_variant(eager_variant: Path) -> None:
    manifest = read_manifest(eager_variant)
    assert (manifest.name, manifest.model, manifest.runtime) == (NAME, "teacher", "eager")
    assert manifest.precision == "fp32"
    assert manifest.options == {}
    assert manifest.cpu_flags == ()
    assert tuple(sorted(manifest.files)) == FILES
    assert len(manifest.digest) == 64
    assert not manifest.carries_code
    assert "torch" in manifest.libraries


def test_digests_are_sha256(eager_variant: Path) -> None:
    digests = read_manifest(eager_variant).files
    lines = "".join(f"{digest}  {name}\n" for name, digest in digests.items())
    subprocess.run(["sha256sum", "--check"], input=lines, text=True, cwd=eager_variant, check=True)


def test_a_moved_folder_loads(folder: Path) -> None:
    moved = folder.rename(folder.with_name("moved elsewhere"))
    loaded = load_variant(moved, threads=1)
    assert loaded.labels == ("card", "refund", "transfer")
    assert loaded.labels[loaded.logits(["i want a refund"]).argmax()] == "refund"


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_is_rejected(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=f"^{NAME}: {name} is not the file that was exported"):
        load_variant(folder, threads=1)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_rejected(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ArtifactError, match=f"^{NAME}: {name} is missing or unexpected"):
        load_variant(folder, threads=1)


@pytest.mark.parametrize("name", ["modeling.py", "sub/pytorch_model.bin", ".hidden"])
def test_an_added_file_is_rejected(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).touch()
    with pytest.raises(ArtifactError, match=f"^{NAME}: {name} is missing or unexpected"):
        load_variant(folder, threads=1)


def test_a_truncated_file_is_rejected(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="model.safetensors is not the file"):
        verify(folder)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[]", b"null", b'"text"', b'{"format": 1, "runtime": "eager"}'],
)
def test_an_unreadable_manifest_is_rejected(folder: Path, content: bytes) -> None:
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=f"{NAME}.*[Ee]xport.* again"):
        load_variant(folder, threads=1)


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nowhere is not a variant: its manifest.json is missi"):
        load_variant(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "changes", [{"format": 2}, {"format": None}, {"runtime": "tvm"}, {"runtime": None}]
)
def test_another_format_version_is_rejected(folder: Path, changes: dict[str, Any]) -> None:
    edit_manifest(folder, **changes)
    with pytest.raises(ArtifactError, match=r"written by another version .*reads format 1\)"):
        load_variant(folder, threads=1)


def test_a_missing_instruction_set(folder: Path) -> None:
    edit_manifest(folder, cpu_flags=["avx9000", "amx_int999"])
    with pytest.raises(UnsupportedError, match="a processor with amx_int999, avx9000, which"):
        load_variant(folder, threads=1)


def test_a_missing_device(exported: Callable[[Variant], Path]) -> None:
    with pytest.raises(UnsupportedError, match="eager-int8-dynamic runs on the CPU only"):
        load_variant(exported(Eager("int8-dynamic")), device="cuda", threads=1)
    with pytest.raises(UnsupportedError, match=r"device=cuda:99: .*Give device=cpu, or install"):
        load_variant(exported(Eager()), device="cuda:99", threads=1)


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_missing_gpu_is_an_error_for_onnxruntime(
    exported: Callable[[Variant], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    folder = exported(OnnxRuntime())
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime has a CUDA provider")
    with pytest.raises(UnsupportedError, match="onnxruntime does not support device=cuda; use"):
        load_variant(folder, device="cuda", threads=1)
    known = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: known)
    with pytest.raises(UnsupportedError, match="onnxruntime does not support device=cuda; use"):
        load_variant(folder, device="cuda", threads=1)


def test_a_gpu_gets_pinned_inputs_and_computes_in_fp32(
    exported: Callable[[Variant], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uses cpu:0, which the runtime treats as a device other than cpu; the golden check runs."""
    import torch

    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    loaded = load_variant(exported(Eager()), device="cpu:0", threads=1)
    assert len(pinned) >= 2
    assert not torch.backends.cudnn.allow_tf32
    assert loaded.logits(["my card"]).shape == (1, 3)


def reseal(folder: Path, golden: dict[str, Any]) -> None:
    """Write golden.json with a correct digest."""
    import hashlib

    text = json.dumps(golden).encode()
    (folder / "golden.json").write_bytes(text)
    files = read_manifest(folder).files | {"golden.json": hashlib.sha256(text).hexdigest()}
    edit_manifest(folder, files=files)


@pytest.mark.parametrize("off_by", [0.1, float("nan")])
def test_different_golden_logits_are_rejected(folder: Path, off_by: float) -> None:
    golden = json.loads((folder / "golden.json").read_text(encoding="utf8"))
    golden["logits"][1][2] += off_by
    reseal(folder, golden)
    with pytest.raises(ArtifactError, match="gives other logits on this .* is (0.1|nan), the tol"):
        load_variant(folder, threads=1)
    assert load_variant(folder, threads=1, check_golden=False).manifest.name == NAME


def test_golden_logits_may_differ_by_rounding(folder: Path) -> None:
    golden = json.loads((folder / "golden.json").read_text(encoding="utf8"))
    golden["logits"][1][2] += 1e-4  # the tolerance is 5e-3, because logits reach 5
    reseal(folder, golden)
    load_variant(folder, threads=1)


def test_code_must_be_allowed(exported: Callable[[Variant], Path]) -> None:
    folder = exported(TorchScript())
    with pytest.raises(UntrustedError, match=r"\(torchscript\) carries executable code.*ALLOW_COD"):
        load_variant(folder, threads=1)
    load_variant(folder, threads=1, allow_code=True)


def test_a_changed_file_with_code_is_rejected_even_if_code_is_allowed(
    exported: Callable[[Variant], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(exported(TorchScript()), tmp_path / "changed"))
    with (folder / "model.torchscript.pt").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ArtifactError, match="model.torchscript.pt is not the file"):
        load_variant(folder, threads=1, allow_code=True)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[ONNXRuntimeError] : 6 : Failed to allocate memory for requested buffer"),
    ],
    ids=["torch", "onnxruntime"],
)
def test_a_device_without_memory_for_the_model(
    eager_variant: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def load(self: Variant, folder: Path, *, device: str, threads: int) -> Predict:
        raise error

    monkeypatch.setattr(Eager, "load", load)
    with pytest.raises(DeviceMemoryError, match=f"{NAME} needs more memory than is free on cuda"):
        load_variant(eager_variant, device="cuda")


def test_only_models_on_a_gpu_are_guarded(
    eager_variant: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Eager.load

    def on_the_cpu(self: Eager, folder: Path, *, device: str, threads: int) -> Predict:
        return load(self, folder, device="cpu", threads=threads)

    monkeypatch.setattr(Eager, "load", on_the_cpu)
    rows = ["a card", "money"]
    plain, guarded = load_variant(eager_variant), load_variant(eager_variant, device="cuda:1")
    assert not isinstance(plain.predict, DeviceMemoryGuard)
    assert isinstance(guarded.predict, DeviceMemoryGuard)
    assert guarded.logits(rows).tolist() == plain.logits(rows).tolist()


def test_golden_rows_without_memory_are_no_damage(
    eager_variant: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(self: Variant, folder: Path, *, device: str, threads: int) -> Predict:
        def predict(inputs: Inputs) -> Logits:
            raise torch.OutOfMemoryError("CUDA out of memory.")

        return predict

    monkeypatch.setattr(Eager, "load", load)
    with pytest.raises(DeviceMemoryError, match="a row needs more memory than is free"):
        load_variant(eager_variant, device="cuda")
