"""Export of many variants in real child processes; a failure is a result with its reason."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from mlflow_pt_deploy.artifacts import load_variant, verify
from mlflow_pt_deploy.artifacts.builder import BuildResult, _describe_failure, build
from mlflow_pt_deploy.data import Splits
from mlflow_pt_deploy.runtimes.base import Variant
from mlflow_pt_deploy.runtimes.eager import Eager
from mlflow_pt_deploy.runtimes.onnxruntime import OnnxRuntime
from mlflow_pt_deploy.runtimes.openvino import OpenVino
from mlflow_pt_deploy.runtimes.torchscript import TorchScript


@dataclass(frozen=True)
class Elsewhere(Eager):
    """A variant that this machine cannot build."""

    runtime = "elsewhere"

    def unsupported(self) -> str:
        return "skipped: this machine is not elsewhere"


@pytest.fixture
def broken_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In child processes onnx is not installed and openvino crashes on import."""
    folder = tmp_path / "libraries"
    folder.mkdir()
    (folder / "onnx.py").write_text("raise ModuleNotFoundError('No onnx', name='onnx')")
    (folder / "openvino.py").write_text("import os; os.kill(os.getpid(), 9)")
    monkeypatch.syspath_prepend(folder)


def test_results_keep_the_order_and_include_failures(
    tiny_model: Path, tiny_splits: Splits, tmp_path: Path, broken_libraries: None
) -> None:
    variants = (Elsewhere(), OpenVino("fp32"), OnnxRuntime("fp32"), Eager("fp32"))
    reported: list[BuildResult] = []
    target = tmp_path / "variants"
    # One child process at a time, so that the crashed one must be replaced.
    built = build(
        {"teacher": tiny_model},
        tiny_splits,
        target,
        variants=variants,
        parallel=1,
        progress=reported.append,
    )
    assert [row.name for row in built] == [variant.name("teacher") for variant in variants]
    assert sorted(reported, key=lambda row: row.name) == sorted(built, key=lambda row: row.name)
    elsewhere, crashed, missing, eager = built

    assert elsewhere.reason == "skipped: this machine is not elsewhere"
    assert reported[0] == elsewhere  # known before any child process starts
    assert "the export was killed (SIGKILL); the machine may have run out of" in crashed.reason
    assert "onnx is not installed" in missing.reason
    assert "pip install 'mlflow-pt-deploy[onnx]'" in missing.reason
    for row in (elsewhere, crashed, missing):
        assert row.folder is None

    assert (eager.model, eager.runtime, eager.precision) == ("teacher", "eager", "fp32")
    assert eager.reason == ""
    assert eager.seconds > 0
    assert eager.folder == target / "teacher-eager-fp32"
    assert list(target.glob("[!.]*")) == [eager.folder]  # names with a dot: left by a killed export
    loaded = load_variant(eager.folder, threads=1)
    assert loaded.labels[loaded.logits(["a refund"]).argmax()] == "refund"


def test_the_last_line_of_a_failed_child_process_is_quoted(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("Loading\nno space left\n")
    assert _describe_failure(3, log) == "the export ended with exit code 3: no space left"
    log.write_text("")
    assert _describe_failure(3, log) == "the export ended with exit code 3"


def test_intact_exports_are_reused_and_corrupted_ones_rebuilt(
    tiny_model: Path, tiny_splits: Splits, tmp_path: Path, exported: Callable[[Variant], Path]
) -> None:
    variants = (Eager("fp32"), Eager("int8-dynamic"), TorchScript("fp32"))
    for variant in variants:
        shutil.copytree(exported(variant), tmp_path / variant.name("teacher"))
    kept, corrupted, code = (tmp_path / variant.name("teacher") for variant in variants)
    with (corrupted / "int8.safetensors").open("ab") as file:
        file.write(b"?")
    before = {path: path.stat().st_mtime_ns for path in (*kept.iterdir(), *code.iterdir())}
    reported: list[str] = []
    built = build(
        {"teacher": tiny_model},
        tiny_splits,
        tmp_path,
        variants=variants,
        progress=lambda row: reported.append(row.name),
    )
    assert [row.folder for row in built] == [kept, corrupted, code]
    assert [row.reason for row in built] == ["", "", ""]
    assert [row.seconds > 0 for row in built] == [False, True, False]
    assert reported == [kept.name, code.name, corrupted.name]  # reused ones come first
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert verify(corrupted).name == "teacher-eager-int8-dynamic"
    assert load_variant(corrupted, threads=1).labels == ("card", "refund", "transfer")


def test_without_missing_variants_no_child_process_starts(
    tiny_splits: Splits, tmp_path: Path, eager_variant: Path
) -> None:
    shutil.copytree(eager_variant, tmp_path / "teacher-eager-fp32")
    nowhere = tmp_path / "nowhere"  # a child process would fail on it
    (row,) = build({"teacher": nowhere}, tiny_splits, tmp_path, variants=[Eager()])
    assert row.folder == tmp_path / "teacher-eager-fp32"


def test_a_missing_model(tiny_splits: Splits, tmp_path: Path) -> None:
    variants = (Eager("fp32"), Eager("int8-dynamic"))
    built = build(
        {"teacher": tmp_path / "nowhere"}, tiny_splits, tmp_path / "variants", variants=variants
    )
    assert [row.name for row in built] == [variant.name("teacher") for variant in variants]
    for row in built:
        assert row.folder is None
        assert "nowhere: no classifier can be loaded" in row.reason


def test_a_hanging_export_times_out(
    tiny_model: Path, tiny_splits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "openvino.py").write_text("import time; time.sleep(600)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("mlflow_pt_deploy.artifacts.builder._TIMEOUT_S", 1)
    (row,) = build(
        {"teacher": tiny_model}, tiny_splits, tmp_path / "variants", variants=[OpenVino()]
    )
    assert row.folder is None
    assert row.reason == "the export timed out after 1 s"
