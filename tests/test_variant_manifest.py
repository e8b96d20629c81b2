"""Manifests and files of every odd kind end in an ArtifactError that says what is wrong."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tiny_artifact import copy_saved, reseal, write_manifest

from mlflow_pt_deploy import flavor
from mlflow_pt_deploy.errors import ArtifactError, PtDeployError
from mlflow_pt_deploy.serving.registry import Address, Target
from mlflow_pt_deploy.serving.version import load_version
from mlflow_pt_deploy.variants import RUNTIMES, Variant, load_variant, verify
from mlflow_pt_deploy.variants.eager import Eager
from mlflow_pt_deploy.variants.onnxruntime import OnnxRuntime
from mlflow_pt_deploy.variants.openvino import OpenVino
from mlflow_pt_deploy.variants.torchscript import TorchScript

ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    2**80,
    1e300,
    "",
    "../x",
    "x" * 2_000_000,
    "\ud800",
    "a\nb",
    [],
    {},
    [[[]]],
    {"a": {"b": []}},
    {"../../etc/passwd": "0" * 64},
)
KEYS = ("format", "name", "model", "runtime", "precision", "options", "cpu_flags", "libraries")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return copy_saved(tmp_path)


def manifest_of(root: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((root / "variant" / "manifest.json").read_text())
    return content


def refused(root: Path, match: str | None = None) -> str:
    """What the server says of a model; in one sentence or two, and within five seconds."""
    start = time.monotonic()
    with pytest.raises(ArtifactError, match=match) as caught:
        load_version(Address(str(root)), Target(str(root)))
    assert time.monotonic() - start < 5
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700, message
    return message


@pytest.mark.parametrize("key", [*KEYS, "files"])
def test_each_key_of_each_odd_kind(saved: Path, key: str) -> None:
    whole = manifest_of(saved)
    for value in ODD:
        if (key, value) in [("options", {}), ("cpu_flags", []), ("libraries", {})]:
            continue  # nothing odd
        if key == "libraries" and value and isinstance(value, dict) and "a" not in value:
            continue  # odd names of libraries mean nothing
        write_manifest(saved, json.dumps(whole | {key: value}).encode())
        refused(saved)
    del whole[key]
    write_manifest(saved, json.dumps(whole).encode())
    refused(saved)


@pytest.mark.parametrize(
    "path",
    [
        "../model.safetensors",
        "/etc/passwd",
        "a/../../b",
        "./static.json",
        "a//b",
        "a\\b",
        "a\0b",
        "",
        ".",
        "x" * 2000,
        "manifest.json",
    ],
)
def test_paths_that_are_none(saved: Path, path: str) -> None:
    whole = manifest_of(saved)
    whole["files"][path] = "0" * 64
    write_manifest(saved, json.dumps(whole).encode())
    refused(saved, "which is not a path below the folder")


@pytest.mark.parametrize("name", ["modeling.py", "pytorch_model.bin", "x.pkl", "ops.so", "m.PT"])
def test_files_that_this_runtime_never_has(saved: Path, name: str) -> None:
    (saved / "variant" / name).write_bytes(b"\x80\x04")
    reseal(saved)
    refused(saved, f"files names '{name}', which numpy never has")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not readable JSON"),
        (b"\xef\xbb\xbf{}", "not readable JSON"),
        (b"\xff\xfe{\0}\0", "not readable JSON"),
        (b"[" * 100_000, "not readable JSON|nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"format": NaN}', "NaN is not a number"),
        (b'{"format": 1, "format": 1}', "a key twice"),
        (b'{"format": ' + b"9" * 10_000 + b"}", "not readable JSON"),
        (b"[]", "not a table of keys"),
        (b'{"format": 1.0, "runtime": "numpy"}', "another version"),
        (b'{"format": true, "runtime": "numpy"}', "another version"),
        (b" " * (5 * 2**20), "larger than"),
    ],
)
def test_odd_bytes(saved: Path, content: bytes, message: str) -> None:
    write_manifest(saved, content)
    refused(saved, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "int4"}, "precision int4 is unknown for numpy"),
        ({"precision": "bf16"}, "precision bf16 is unknown for numpy"),
        ({"options": {"__class__": 1}}, "is no option of numpy"),
        ({"runtime": "openvino", "options": {"max_drop": "all"}}, "max_drop is not a float"),
        ({"runtime": "openvino", "options": {"max_drop": True}}, "max_drop is not a float"),
        (
            {"runtime": "cascade", "precision": "mixed", "options": {"trusted": 1}},
            "executable code",
        ),
        ({"runtime": "cascade", "precision": "mixed", "options": {"flags": [1]}}, "not a tuple"),
        ({"runtime": "cascade", "precision": "mixed", "options": {"threshold": 2}}, "0 and 1"),
        ({"runtime": "cascade", "precision": "mixed", "options": {"fast": "a"}}, "is no variant"),
        (
            {"runtime": "cascade", "precision": "mixed", "options": {"fast": "a-cascade-b"}},
            "is no variant",
        ),
    ],
)
def test_options_that_are_none(saved: Path, changes: dict[str, Any], message: str) -> None:
    write_manifest(saved, json.dumps(manifest_of(saved) | changes).encode())
    refused(saved, message)


@pytest.mark.filterwarnings("ignore")  # of libraries that are given files of another kind
@pytest.mark.parametrize("runtime", sorted(RUNTIMES.keys() - {"numpy"}))
def test_files_of_another_runtime(saved: Path, runtime: str) -> None:
    changes: dict[str, Any] = {"runtime": runtime, "precision": "fp32"}
    if runtime == "cascade":
        changes["precision"] = "mixed"
        changes["options"] = {"fast": "a-numpy-fp32", "strong": "b-numpy-fp32"}
    write_manifest(saved, json.dumps(manifest_of(saved) | changes).encode())
    with pytest.raises(PtDeployError) as caught:
        load_variant(saved / "variant", allow_code=True, threads=1)
    assert "\n" not in str(caught.value)


LABELS = (
    b"[]",
    b"{}",
    b'["a"]',
    b'["a", "b", 3]',
    b'["a", "b", "c", "d"]',
    b'"abc"',
    b"null",
    b"[" * 9999,
    b"\xff",
)


@pytest.mark.parametrize("content", LABELS)
def test_labels_that_do_not_fit(saved: Path, content: bytes) -> None:
    reseal(saved, labels_json=content)
    refused(saved, r"labels\.json")


@pytest.mark.parametrize(
    "golden",
    [
        {},
        [],
        None,
        {"rows": [], "logits": []},
        {"rows": ["a"], "logits": []},
        {"rows": ["a"], "logits": [[1, 2]]},
        {"rows": ["a"], "logits": [[1, 2, "x"]]},
        {"rows": ["a"], "logits": [[1, 2, [3]]]},
        {"rows": ["a"], "logits": [[1e999, 2, 3]]},
        {"rows": ["a"], "logits": [[2**4000, 2, 3]]},
        {"rows": [{"base64": "AAAA"}], "logits": [[1, 2, 3]]},
        {"rows": [{"base64": 7}], "logits": [[1, 2, 3]]},
        {"rows": [7], "logits": [[1, 2, 3]]},
        {"rows": "abc", "logits": [[1, 2, 3]] * 3},
    ],
)
@pytest.mark.filterwarnings("error")
def test_golden_rows_that_cannot_be_used(saved: Path, golden: object) -> None:
    reseal(saved, golden_json=json.dumps(golden).encode())
    refused(saved, "golden.json cannot be used|answers differently")


@pytest.mark.parametrize(
    "settings",
    [
        [],
        {},
        {"kind": "audio"},
        {"kind": ["text"]},
        {"kind": "text"},
        {"kind": "text", "max_length": "long", "pad_id": 0},
        {"kind": "text", "max_length": 2**70, "pad_id": 0},
        {"kind": "text", "max_length": 16, "pad_id": -1},
        {"kind": "text", "max_length": True, "pad_id": 0},
        {"kind": "image", "height": 10**6, "width": 10**6},
        {"kind": "image", "height": 4, "width": 4, "mean": [1, 2]},
        {"kind": "image", "height": 4, "width": 4, "resample": 99},
        {"kind": "image", "height": 4, "width": 4, "rescale": "a"},
    ],
)
def test_preprocessors_that_are_none(saved: Path, settings: object) -> None:
    reseal(saved, preprocessor_json=json.dumps(settings).encode())
    refused(saved, "the preprocessor cannot be read")


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b'{"model": {"type": "Evil"}}'])
def test_tokenizers_that_are_none(saved: Path, content: bytes) -> None:
    reseal(saved, tokenizer_json=content)
    refused(saved, "the preprocessor cannot be read")


@pytest.mark.parametrize(
    "files",
    [
        {"static_json": b"[]"},
        {"static_json": b"{}"},
        {"static_json": b"not json"},
        {"static_json": b'{"pieces": 1, "buckets": "a", "multipliers": [1], "epsilon": 0}'},
        {"static_safetensors": b""},
        {"static_safetensors": b"\xff" * 64},
    ],
)
def test_runtime_files_that_are_none(saved: Path, files: dict[str, bytes]) -> None:
    reseal(saved, **files)
    refused(saved, "numpy cannot load its files|cannot answer its golden rows|answers diff")


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


def test_weights_in_parts_come_from_this_folder(saved: Path) -> None:
    index = {"weight_map": {"a": "../../elsewhere.safetensors"}}
    (saved / "variant" / "model.safetensors.index.json").write_text(json.dumps(index))
    reseal(saved)
    write_manifest(saved, json.dumps(manifest_of(saved) | {"runtime": "eager"}).encode())
    refused(saved, "model.safetensors.index.json names files that do not belong")


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname", "secret", "/dev/zero"])
def test_weights_outside_of_an_onnx_file(saved: Path, tmp_path: Path, location: str) -> None:
    """ONNX Runtime reads external data from the model's folder alone."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    (saved / "secret").write_bytes(b"\0" * 16)
    weights = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[4])
    weights.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "16")):
        weights.external_data.add(key=key, value=value)
    rows = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [4])
    logits = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, [4])
    add = onnx.helper.make_node("Add", ["x", "w"], ["logits"])
    graph = onnx.helper.make_graph([add], "g", [rows], [logits], [weights])
    version = onnx.helper.make_opsetid("", 17)
    model = onnx.helper.make_model(graph, opset_imports=[version], ir_version=8)
    (saved / "variant" / "model.onnx").write_bytes(model.SerializeToString())
    reseal(saved)
    write_manifest(saved, json.dumps(manifest_of(saved) | {"runtime": "onnxruntime"}).encode())
    refused(saved, r"onnxruntime cannot load its files \(.*External data path")


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
