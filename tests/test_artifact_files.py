"""Files of an artifact: regular ones only, read from a private copy, written for all to read."""

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
from tiny_artifact import copy_saved, refused

from mlflow_pt_deploy import flavor
from mlflow_pt_deploy.errors import ArtifactError
from mlflow_pt_deploy.serving.registry import Address, Target
from mlflow_pt_deploy.serving.version import load_version
from mlflow_pt_deploy.variants import Variant, verify
from mlflow_pt_deploy.variants.eager import Eager
from mlflow_pt_deploy.variants.onnxruntime import OnnxRuntime
from mlflow_pt_deploy.variants.openvino import OpenVino
from mlflow_pt_deploy.variants.torchscript import TorchScript


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
    """A path of at most a hundred characters is possible; so it is bound from its folder."""
    code = f"import socket; socket.socket(socket.AF_UNIX).bind({path.name!r})"
    subprocess.run([sys.executable, "-c", code], cwd=path.parent, check=True)


def linked_folder(path: Path) -> None:
    path.symlink_to("/etc", target_is_directory=True)


@pytest.mark.parametrize("make", [fifo, outside, inside, dangling, unix_socket, linked_folder])
@pytest.mark.parametrize("name", ["MLmodel", "variant/manifest.json", "variant/labels.json", "new"])
def test_only_regular_files(saved: Path, make: Callable[[Path], None], name: str) -> None:
    path = saved / name
    path.unlink(missing_ok=True)
    make(path)
    for call in (flavor.load_model, flavor._load_pyfunc):
        with pytest.raises(ArtifactError, match=f"{name} is not a regular file|MLmodel|no variant"):
            call(str(saved))
    refused(saved, "is not a regular file")
    if name.startswith("variant/"):
        with pytest.raises(ArtifactError, match="is not a regular file"):
            verify(saved / "variant")


def test_folders_without_end(saved: Path) -> None:
    (saved / "/".join("d" * 20)).mkdir(parents=True)
    refused(saved, "more than 16 deep")


def test_the_copy_that_was_checked_is_what_is_loaded(saved: Path) -> None:
    """Changes of the folder after it was fetched do not reach what serves."""
    version = load_version(Address(str(saved)), Target(str(saved)))
    before = version.pyfunc.loaded.logits(["my card"]).tolist()
    for path in (saved / "variant").iterdir():
        path.write_bytes(b"\0" * path.stat().st_size)
    assert version.pyfunc.loaded.logits(["my card"]).tolist() == before


@contextmanager
def without_privileges() -> Iterator[None]:
    """As another user where the tests run as root, who may read everything."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize("name", ["MLmodel", "variant/manifest.json", "variant/static.safetensors"])
def test_a_file_that_may_not_be_read_is_named(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own is private
        Path(folder).chmod(0o755)
        saved = copy_saved(Path(folder))
        flavor._load_pyfunc(str(saved))  # imports what it needs
        (saved / name).chmod(0o600)
        os.chown(saved / name, os.geteuid(), -1)
        if os.geteuid():
            (saved / name).chmod(0)
        message = rf"{Path(name).name} may not be read by this user \(Permission denied\)"
        with without_privileges(), pytest.raises(ArtifactError, match=message):
            flavor._load_pyfunc(str(saved))


VARIANTS = (Eager(), Eager("int8-dynamic"), TorchScript(), OnnxRuntime(), OpenVino())


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name("t"))
def test_everyone_may_read_what_is_written(
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
