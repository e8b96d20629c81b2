"""A variant's folder: all of it or nothing, and nothing that changed is loaded."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mlflow_pt_deploy.errors import ArtifactError, UnsupportedError, UntrustedError, VariantError
from mlflow_pt_deploy.preprocess import TextPreprocessor
from mlflow_pt_deploy.variants import Variant, load_variant, read_manifest, verify, write_variant
from mlflow_pt_deploy.variants.eager import Eager
from mlflow_pt_deploy.variants.onnxruntime import OnnxRuntime
from mlflow_pt_deploy.variants.torchscript import TorchScript

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
    """A copy to spoil."""
    return Path(shutil.copytree(eager_variant, tmp_path / NAME))


def edit_manifest(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf8")) | changes))


@dataclass(frozen=True)
class Constant(Variant):
    """Three files' worth of a runtime: always the same logits."""

    value: float = 1.0
    runtime = "eager"  # the manifest must name a runtime of the table

    def export(self, module, example, calibration, folder: Path) -> None:
        (folder / "weights.txt").write_text(str(self.value))

    def load(self, folder: Path, *, device: str, threads: int):
        logits = np.full((1, 2), float((folder / "weights.txt").read_text()), dtype=np.float32)
        return lambda inputs: np.repeat(logits, len(inputs["input_ids"]), axis=0)


@dataclass(frozen=True)
class FullDisk(Constant):
    def export(self, module, example, calibration, folder: Path) -> None:
        (folder / "weights.txt").write_text("1.")
        raise OSError(errno.ENOSPC, "No space left on device")


@dataclass(frozen=True)
class Inexpressible(Constant):
    def load(self, folder: Path, *, device: str, threads: int):
        raise VariantError("the runtime knows no such operator")


class Unsure(SimpleNamespace):
    """All that `Constant` needs of a classifier."""

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.ones(len(ids), 2)


@pytest.fixture
def module(eager_variant: Path) -> Unsure:
    return Unsure(preprocessor=TextPreprocessor.load(eager_variant), labels=("no", "yes"))


def write(variant: Variant, module: Unsure, target: Path) -> None:
    write_variant(variant, module, target, model="teacher", example={}, golden_rows=["my card"])


def test_the_manifest_says_what_it_is(eager_variant: Path) -> None:
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


def test_an_untouched_folder_loads_from_anywhere(folder: Path) -> None:
    moved = folder.rename(folder.with_name("moved elsewhere"))
    loaded = load_variant(moved, threads=1)
    assert loaded.labels == ("card", "refund", "transfer")
    assert loaded.labels[loaded.logits(["i want a refund"]).argmax()] == "refund"


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_byte(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=f"^{NAME}: {name} is not the file that was exported"):
        load_variant(folder, threads=1)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ArtifactError, match=f"^{NAME}: {name} is missing or does not belong here"):
        load_variant(folder, threads=1)


@pytest.mark.parametrize("name", ["modeling.py", "sub/pytorch_model.bin", ".hidden"])
def test_an_added_file(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).touch()
    with pytest.raises(ArtifactError, match=f"^{NAME}: {name} is missing or does not belong here"):
        load_variant(folder, threads=1)


def test_a_file_that_was_cut_off(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="model.safetensors is not the file"):
        verify(folder)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[]", b"null", b'"text"', b'{"format": 1, "runtime": "eager"}'],
)
def test_an_unreadable_manifest(folder: Path, content: bytes) -> None:
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=f"{NAME}.*[Ee]xport.* again"):
        load_variant(folder, threads=1)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nowhere is not a variant: its manifest.json is missi"):
        load_variant(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "changes", [{"format": 2}, {"format": None}, {"runtime": "tensorrt"}, {"runtime": None}]
)
def test_another_versions_format(folder: Path, changes: dict[str, Any]) -> None:
    edit_manifest(folder, **changes)
    with pytest.raises(ArtifactError, match=r"written by another version .*reads format 1\)"):
        load_variant(folder, threads=1)


def test_an_instruction_set_that_is_not_here(folder: Path) -> None:
    edit_manifest(folder, cpu_flags=["avx9000", "amx_int999"])
    with pytest.raises(UnsupportedError, match="a processor with amx_int999, avx9000, which"):
        load_variant(folder, threads=1)


def test_a_device_that_is_not_here(exported: Callable[[Variant], Path]) -> None:
    with pytest.raises(UnsupportedError, match="eager-int8-dynamic runs on the CPU only"):
        load_variant(exported(Eager("int8-dynamic")), device="cuda", threads=1)
    with pytest.raises(UnsupportedError, match=r"device=cuda:99: .*Give device=cpu, or see"):
        load_variant(exported(Eager()), device="cuda:99", threads=1)


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_gpu_that_onnxruntime_would_only_warn_of(
    exported: Callable[[Variant], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    folder = exported(OnnxRuntime())
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("there is one")
    with pytest.raises(UnsupportedError, match="onnxruntime cannot use device=cuda; use device=c"):
        load_variant(folder, device="cuda", threads=1)
    known = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: known)
    with pytest.raises(UnsupportedError, match="onnxruntime cannot use device=cuda; use device=c"):
        load_variant(folder, device="cuda", threads=1)


def test_a_gpu_is_given_pinned_inputs_and_computes_in_fp32(
    exported: Callable[[Variant], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device that is no GPU, but is not called cpu either; the golden check compares."""
    import torch

    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    loaded = load_variant(exported(Eager()), device="cpu:0", threads=1)
    assert len(pinned) >= 2
    assert not torch.backends.cudnn.allow_tf32
    assert loaded.logits(["my card"]).shape == (1, 3)


def reseal(folder: Path, golden: dict[str, Any]) -> None:
    """Make the golden rows what somebody else's machine would have written."""
    import hashlib

    text = json.dumps(golden).encode()
    (folder / "golden.json").write_bytes(text)
    files = read_manifest(folder).files | {"golden.json": hashlib.sha256(text).hexdigest()}
    edit_manifest(folder, files=files)


@pytest.mark.parametrize("off_by", [0.1, float("nan")])
def test_golden_logits_that_differ(folder: Path, off_by: float) -> None:
    golden = json.loads((folder / "golden.json").read_text(encoding="utf8"))
    golden["logits"][1][2] += off_by
    reseal(folder, golden)
    with pytest.raises(ArtifactError, match="answers differently here .* off by (0.1|nan), allow"):
        load_variant(folder, threads=1)
    assert load_variant(folder, threads=1, check_golden=False).manifest.name == NAME


def test_golden_logits_that_differ_by_rounding(folder: Path) -> None:
    golden = json.loads((folder / "golden.json").read_text(encoding="utf8"))
    golden["logits"][1][2] += 1e-4  # of logits that reach 5: allowed are 5e-3
    reseal(folder, golden)
    load_variant(folder, threads=1)


def test_code_needs_somebody_who_vouches(exported: Callable[[Variant], Path]) -> None:
    folder = exported(TorchScript())
    with pytest.raises(UntrustedError, match=r"\(torchscript\) carries executable code.*ALLOW_COD"):
        load_variant(folder, threads=1)
    load_variant(folder, threads=1, allow_code=True)


def test_a_changed_file_with_code_is_refused_whoever_vouches(
    exported: Callable[[Variant], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(exported(TorchScript()), tmp_path / "changed"))
    with (folder / "model.torchscript.pt").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ArtifactError, match="model.torchscript.pt is not the file"):
        load_variant(folder, threads=1, allow_code=True)


@pytest.mark.parametrize("variant", [FullDisk(), Inexpressible()])
@pytest.mark.parametrize("earlier", [False, True])
def test_a_failed_export_leaves_nothing_behind(
    variant: Variant, module: Unsure, tmp_path: Path, earlier: bool
) -> None:
    target = tmp_path / "variants" / "teacher-eager-fp32"
    if earlier:
        write(Constant(), module, target)
    with pytest.raises((OSError, VariantError), match="No space left|no such operator"):
        write(variant, module, target)
    assert list(target.parent.iterdir()) == [target] * earlier
    if earlier:  # and the one that was there is still whole
        assert verify(target).name == target.name


def test_an_export_replaces_the_one_before(module: Unsure, tmp_path: Path) -> None:
    target = tmp_path / "teacher-eager-fp32"
    write(Constant(value=1.0), module, target)
    (target / "stray").touch()
    before = read_manifest(target)
    write(Constant(value=2.0), module, target)
    assert (target / "weights.txt").read_text() == "2.0"
    after = verify(target)
    assert after.digest != before.digest
    assert after.options == {"value": 2.0}
    assert [path.name for path in tmp_path.iterdir()] == ["teacher-eager-fp32"]


def test_others_may_read_it(module: Unsure, tmp_path: Path) -> None:
    target = tmp_path / "teacher-eager-fp32"
    write(Constant(), module, target)
    assert target.stat().st_mode & 0o777 == 0o755


KILLED = """
import sys, time
from pathlib import Path
from test_variant_folder import Constant, TextPreprocessor, SimpleNamespace, write

class Slow(Constant):
    def export(self, module, example, calibration, folder):
        super().export(module, example, calibration, folder)
        print("half way", flush=True)
        time.sleep(60)

source, target = map(Path, sys.argv[1:])
module = SimpleNamespace(preprocessor=TextPreprocessor.load(source), labels=("no", "yes"))
write(Slow(), module, target)
"""


def test_a_process_killed_in_an_export(eager_variant: Path, module: Unsure, tmp_path: Path) -> None:
    target = tmp_path / "teacher-eager-fp32"
    command = [sys.executable, "-c", KILLED, str(eager_variant), str(target)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "half way\n"
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    assert not target.exists()
    write(Constant(), module, target)  # what it left does not stand in the way
    assert verify(target).name == target.name
