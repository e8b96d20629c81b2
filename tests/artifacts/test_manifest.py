"""Every invalid manifest or file raises an ArtifactError that names the problem."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny.artifact import SAVED, copy_saved, expect_rejection, reseal, write_manifest

from mlflow_pt_deploy.artifacts import load_variant
from mlflow_pt_deploy.artifacts.cascade_writer import write_cascade
from mlflow_pt_deploy.errors import PtDeployError
from mlflow_pt_deploy.runtimes.catalog import RUNTIMES

INVALID: tuple[Any, ...] = (
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


@pytest.mark.parametrize("key", [*KEYS, "files"])
def test_each_key_with_each_invalid_value(saved: Path, key: str) -> None:
    manifest = manifest_of(saved)
    for value in INVALID:
        if (key, value) in [("options", {}), ("cpu_flags", []), ("libraries", {})]:
            continue  # valid
        if key == "libraries" and value and isinstance(value, dict) and "a" not in value:
            continue  # names of libraries are not validated
        write_manifest(saved, json.dumps(manifest | {key: value}).encode())
        expect_rejection(saved)
    del manifest[key]
    write_manifest(saved, json.dumps(manifest).encode())
    expect_rejection(saved)


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
def test_invalid_paths(saved: Path, path: str) -> None:
    manifest = manifest_of(saved)
    manifest["files"][path] = "0" * 64
    write_manifest(saved, json.dumps(manifest).encode())
    expect_rejection(saved, "is not a path inside the folder")


@pytest.mark.parametrize("name", ["modeling.py", "pytorch_model.bin", "x.pkl", "ops.so", "m.PT"])
def test_files_that_the_runtime_never_writes(saved: Path, name: str) -> None:
    (saved / "variant" / name).write_bytes(b"\x80\x04")
    reseal(saved)
    expect_rejection(saved, f"files: numpy never writes '{name}'")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not readable JSON"),
        (b"\xef\xbb\xbf{}", "not readable JSON"),
        (b"\xff\xfe{\0}\0", "not readable JSON"),
        (b"[" * 100_000, "not readable JSON|nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"format": NaN}', "NaN is not a number"),
        (b'{"format": 1, "format": 1}', "a duplicate key"),
        (b'{"format": ' + b"9" * 10_000 + b"}", "not readable JSON"),
        (b"[]", "not a JSON object"),
        (b'{"format": 1.0, "runtime": "numpy"}', "another version"),
        (b'{"format": true, "runtime": "numpy"}', "another version"),
        (b" " * (5 * 2**20), "larger than"),
    ],
)
def test_unreadable_manifests(saved: Path, content: bytes, message: str) -> None:
    write_manifest(saved, content)
    expect_rejection(saved, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "int4"}, "precision int4 is unknown for numpy"),
        ({"precision": "bf16"}, "precision bf16 is unknown for numpy"),
        ({"options": {"__class__": 1}}, "numpy has no option"),
        ({"runtime": "openvino", "options": {"max_drop": "all"}}, "max_drop is not a float"),
        ({"runtime": "openvino", "options": {"max_drop": True}}, "max_drop is not a float"),
        (
            {"runtime": "cascade", "precision": "mixed", "options": {"trusted": 1}},
            "executable code",
        ),
        ({"runtime": "cascade", "precision": "mixed", "options": {"flags": [1]}}, "not a tuple"),
        ({"runtime": "cascade", "precision": "mixed", "options": {"threshold": 2}}, "0 and 1"),
        (
            {"runtime": "cascade", "precision": "mixed", "options": {"fast": "a"}},
            "is not a variant",
        ),
        (
            {"runtime": "cascade", "precision": "mixed", "options": {"fast": "a-cascade-b"}},
            "is not a variant",
        ),
    ],
)
def test_invalid_options(saved: Path, changes: dict[str, Any], message: str) -> None:
    write_manifest(saved, json.dumps(manifest_of(saved) | changes).encode())
    expect_rejection(saved, message)


@pytest.mark.filterwarnings("ignore")  # libraries warn about files of another format
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
def test_invalid_labels(saved: Path, content: bytes) -> None:
    reseal(saved, labels_json=content)
    expect_rejection(saved, r"labels\.json")


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
    expect_rejection(saved, "golden.json is invalid|gives other logits")


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
def test_invalid_preprocessors(saved: Path, settings: object) -> None:
    reseal(saved, preprocessor_json=json.dumps(settings).encode())
    expect_rejection(saved, "the preprocessor cannot be read")


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b'{"model": {"type": "Evil"}}'])
def test_invalid_tokenizers(saved: Path, content: bytes) -> None:
    reseal(saved, tokenizer_json=content)
    expect_rejection(saved, "the preprocessor cannot be read")


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
def test_invalid_runtime_files(saved: Path, files: dict[str, bytes]) -> None:
    reseal(saved, **files)
    expect_rejection(
        saved, "numpy cannot load its files|fails on its golden rows|gives other logits"
    )


def test_sharded_weights_come_from_this_folder(saved: Path) -> None:
    index = {"weight_map": {"a": "../../elsewhere.safetensors"}}
    (saved / "variant" / "model.safetensors.index.json").write_text(json.dumps(index))
    reseal(saved)
    write_manifest(saved, json.dumps(manifest_of(saved) | {"runtime": "eager"}).encode())
    expect_rejection(saved, "model.safetensors.index.json names files outside of the variant")


def test_a_file_smuggled_into_a_stage_of_a_cascade(tmp_path: Path) -> None:
    """Only the manifest of the cascade lists the file; transformers would unpickle it."""
    root, stage = copy_saved(tmp_path), SAVED / "variant"
    shutil.rmtree(root / "variant")
    write_cascade(root / "variant", stage, stage, threshold=0.5, golden_rows=["my card"])
    reseal(root)
    load_variant(root / "variant")
    (root / "variant" / "fast" / "pytorch_model.bin").write_bytes(b"\x80\x04")
    reseal(root)
    expect_rejection(root, "student-numpy-fp32: pytorch_model.bin is missing or unexpected")


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname", "secret", "/dev/zero"])
def test_external_data_of_an_onnx_file(saved: Path, tmp_path: Path, location: str) -> None:
    """ONNX Runtime reads external data only from the model folder."""
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
    expect_rejection(saved, r"onnxruntime cannot load its files \(.*External data path")
