"""A variant folder is written atomically."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mlflow_pt_deploy.artifacts import read_manifest, verify, write_variant
from mlflow_pt_deploy.errors import VariantError
from mlflow_pt_deploy.preprocessing import TextPreprocessor
from mlflow_pt_deploy.runtimes.base import Variant


@dataclass(frozen=True)
class Constant(Variant):
    """A minimal runtime that always returns the same logits."""

    value: float = 1.0
    runtime = "eager"  # the manifest must name a known runtime

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
class Unsupported(Constant):
    def load(self, folder: Path, *, device: str, threads: int):
        raise VariantError("the runtime has no such operator")


class ConstantClassifier(SimpleNamespace):
    """The part of a classifier that `Constant` needs."""

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.ones(len(ids), 2)


@pytest.fixture
def module(eager_variant: Path) -> ConstantClassifier:
    return ConstantClassifier(
        preprocessor=TextPreprocessor.load(eager_variant), labels=("no", "yes")
    )


def write(variant: Variant, module: ConstantClassifier, target: Path) -> None:
    write_variant(variant, module, target, model="teacher", example={}, golden_rows=["my card"])


@pytest.mark.parametrize("variant", [FullDisk(), Unsupported()])
@pytest.mark.parametrize("earlier", [False, True])
def test_a_failed_export_leaves_no_files(
    variant: Variant, module: ConstantClassifier, tmp_path: Path, earlier: bool
) -> None:
    target = tmp_path / "variants" / "teacher-eager-fp32"
    if earlier:
        write(Constant(), module, target)
    with pytest.raises((OSError, VariantError), match="No space left|no such operator"):
        write(variant, module, target)
    assert list(target.parent.iterdir()) == [target] * earlier
    if earlier:  # the earlier export is still complete
        assert verify(target).name == target.name


def test_an_export_replaces_an_earlier_one(module: ConstantClassifier, tmp_path: Path) -> None:
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


def test_the_folder_is_world_readable(module: ConstantClassifier, tmp_path: Path) -> None:
    target = tmp_path / "teacher-eager-fp32"
    write(Constant(), module, target)
    assert target.stat().st_mode & 0o777 == 0o755


KILLED = """
import sys, time
from pathlib import Path
from test_writing import Constant, TextPreprocessor, SimpleNamespace, write

class Slow(Constant):
    def export(self, module, example, calibration, folder):
        super().export(module, example, calibration, folder)
        print("half way", flush=True)
        time.sleep(60)

source, target = map(Path, sys.argv[1:])
module = SimpleNamespace(preprocessor=TextPreprocessor.load(source), labels=("no", "yes"))
write(Slow(), module, target)
"""


def test_a_process_killed_during_an_export(
    eager_variant: Path, module: ConstantClassifier, tmp_path: Path
) -> None:
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
    write(Constant(), module, target)  # leftovers of the killed process do not interfere
    assert verify(target).name == target.name
