"""Artifact files: regular files only, loaded from a private copy, written world-readable."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny.artifact import copy_saved, expect_rejection

from mlflow_pt_deploy import flavor
from mlflow_pt_deploy.artifacts import verify
from mlflow_pt_deploy.errors import ArtifactError
from mlflow_pt_deploy.registry.addresses import ModelSpec, ResolvedVersion
from mlflow_pt_deploy.runtimes.base import Variant
from mlflow_pt_deploy.runtimes.eager import Eager
from mlflow_pt_deploy.runtimes.onnxruntime import OnnxRuntime
from mlflow_pt_deploy.runtimes.openvino import OpenVino
from mlflow_pt_deploy.runtimes.torchscript import TorchScript
from mlflow_pt_deploy.serving.model.loaded_model import load_version


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return copy_saved(tmp_path)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def outside(path: Path) -> None:
    path.symlink_to("/dev/zero")


def inside(path: Path) -> None:
    path.with_name("real").write_text("{}")
    path.symlink_to("real")


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def unix_socket(path: Path) -> None:
    """Bind in the folder of the path, because a socket path has at most about 100 characters."""
    code = f"import socket; socket.socket(socket.AF_UNIX).bind({path.name!r})"
    subprocess.run([sys.executable, "-c", code], cwd=path.parent, check=True)


def linked_folder(path: Path) -> None:
    path.symlink_to("/etc", target_is_directory=True)


@pytest.mark.parametrize("make", [fifo, outside, inside, dangling, unix_socket, linked_folder])
@pytest.mark.parametrize("name", ["MLmodel", "variant/manifest.json", "variant/labels.json", "new"])
def test_other_than_regular_files_are_rejected(
    saved: Path, make: Callable[[Path], None], name: str
) -> None:
    path = saved / name
    path.unlink(missing_ok=True)
    make(path)
    for call in (flavor.load_model, flavor._load_pyfunc):
        with pytest.raises(ArtifactError, match=f"{name} is not a regular file|MLmodel|no variant"):
            call(str(saved))
    expect_rejection(saved, "is not a regular file")
    if name.startswith("variant/"):
        with pytest.raises(ArtifactError, match="is not a regular file"):
            verify(saved / "variant")


def test_deeply_nested_folders_are_rejected(saved: Path) -> None:
    (saved / "/".join("d" * 20)).mkdir(parents=True)
    expect_rejection(saved, "more than 16 deep")


def test_the_checked_copy_is_the_one_that_is_loaded(saved: Path) -> None:
    """Later changes of the source folder do not affect the served model."""
    version = load_version(ResolvedVersion(str(saved)), ModelSpec(str(saved)))
    before = version.pyfunc.loaded.logits(["my card"]).tolist()
    for path in (saved / "variant").iterdir():
        path.write_bytes(b"\0" * path.stat().st_size)
    assert version.pyfunc.loaded.logits(["my card"]).tolist() == before


@contextmanager
def without_privileges() -> Iterator[None]:
    """Run as another user if the tests run as root, because root may read everything."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize("name", ["MLmodel", "variant/manifest.json", "variant/static.safetensors"])
def test_an_unreadable_file_is_named(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folder is private
        Path(folder).chmod(0o755)
        saved = copy_saved(Path(folder))
        flavor._load_pyfunc(str(saved))  # import everything that is needed
        (saved / name).chmod(0o600)
        os.chown(saved / name, os.geteuid(), -1)
        if os.geteuid():
            (saved / name).chmod(0)
        message = rf"{Path(name).name} may not be read by this user \(Permission denied\)"
        with without_privileges(), pytest.raises(ArtifactError, match=message):
            flavor._load_pyfunc(str(saved))


VARIANTS = (Eager(), Eager("int8-dynamic"), TorchScript(), OnnxRuntime(), OpenVino())


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name("t"))
def test_written_files_are_world_readable(
    exported: Callable[..., Path], tmp_path: Path, variant: Variant
) -> None:
    for kind in (variant.extra and ["openvino" if variant.runtime == "openvino" else "onnx"]) or []:
        pytest.importorskip(kind)
    before = os.umask(0o077)
    try:
        flavor.save_model(exported(variant), tmp_path / "saved")
    finally:
        os.umask(before)
    for root in (exported(variant), tmp_path / "saved"):
        for path in (root, *root.rglob("*")):
            wanted = 0o755 if path.is_dir() else 0o644
            assert stat.S_IMODE(path.stat().st_mode) == wanted, path
