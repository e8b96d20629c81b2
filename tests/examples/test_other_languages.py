"""The C++ and Node examples score a variant's folder as Python does, without Python."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from mlflow_pt_deploy.artifacts import golden, load_variant
from mlflow_pt_deploy.preprocessing import TextPreprocessor
from mlflow_pt_deploy.runtimes.aotinductor import AOTInductor
from mlflow_pt_deploy.runtimes.base import Variant
from mlflow_pt_deploy.runtimes.onnxruntime import OnnxRuntime
from mlflow_pt_deploy.runtimes.openvino import OpenVino

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TEXTS = (
    "",
    " ",
    "a",
    "Please REFUND me, now!",
    "contactless-card's   pin?",
    "[MASK] is special, [NAME] is not",
    "mask me [mask][SEP] twice [SEP][SEP]",
    "tab\tand\nnewline\x07 \u200b control",
    "naïve CAFÉ, Åland",
    "“It’s – well — fine…” ‘quoted’",
    "日本 card 😀 refund 한국어",
    "שלום בית",
    "İstanbul ΣΑΣ ß ǅ",
    "private \ue000 unassigned \u0378 replaced \ufffd",
    "x" * 150,
    "card " * 300,
    "1234567890 £5 $5 100%",
    "~!@#$%^&*()_+{}|:\"<>?`-=[]\\;',./",
    "no\u00a0break soft\u00adhyphen line\u2028break",
)
Export = Callable[..., Path]


def _run(*words: object) -> subprocess.CompletedProcess[str]:
    texts = [str(word) for word in words]
    return subprocess.run(texts, capture_output=True, text=True, encoding="utf8", check=False)


def _check_scores(program: list[object], folder: Path) -> None:
    """Golden rows agree, and labels and scores of `TEXTS` are those of Python."""
    done = _run(*program, folder, *TEXTS)
    assert done.returncode == 0, done.stderr
    first, *lines = done.stdout.rstrip("\n").split("\n")
    assert first.startswith("4 golden rows agree: logits differ by ")
    variant = load_variant(folder, allow_code=True)
    for text, line in zip(TEXTS, lines, strict=True):
        (logits,) = variant.logits([text]).astype(np.float64)
        label, score = line.split("\t")
        assert label == variant.labels[logits.argmax()], repr(text)
        expected = np.exp(logits.max() - np.logaddexp.reduce(logits))
        assert float(score) == pytest.approx(expected, abs=1e-3), repr(text)


def _check_changed_label(program: list[object], folder: Path, scratch: Path) -> None:
    """A golden row with another label, or with other logits, is named."""
    changed = Path(shutil.copytree(folder, scratch / "changed"))
    content = json.loads((changed / "golden.json").read_text())
    content["logits"][1].reverse()
    content["logits"][1][1] -= 20
    content["logits"][2][0] += 1
    (changed / "golden.json").write_text(json.dumps(content))
    done = _run(*program, changed, "card")
    assert done.returncode == 1
    assert re.findall(r"golden row (\d) differs", done.stderr) == ["2", "3"]
    assert done.stdout == ""


def _check_errors(program: list[object], other: Path, scratch: Path) -> None:
    """Folders of another runtime, and those that are no variant, are refused in one sentence."""
    done = _run(*program, other)
    assert done.returncode == 2
    assert "error: the runtime of this variant is eager; give a folder of" in done.stderr
    done = _run(*program, scratch / "missing")
    assert done.returncode == 2
    assert "manifest.json" in done.stderr
    assert _run(*program).stderr.startswith("usage: ")


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """The Node program, beside its packages."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    installed = os.environ.get("PT_DEPLOY_NODE_MODULES", EXAMPLES / "node" / "node_modules")
    packages = Path(installed).resolve()
    if not (packages / "onnxruntime-node").is_dir():
        pytest.skip("npm packages are missing: npm install in examples/node")
    folder = tmp_path_factory.mktemp("node")
    shutil.copy(EXAMPLES / "node" / "golden.mjs", folder)
    (folder / "node_modules").symlink_to(packages)
    return ["node", folder / "golden.mjs"]


@pytest.mark.parametrize("precision", ["fp32", "int8-dynamic"])
def test_node(node: list[object], exported: Export, precision: str) -> None:
    _check_scores(node, exported(OnnxRuntime(precision)))


def test_node_names_what_differs(
    node: list[object], exported: Export, eager_variant: Path, tmp_path: Path
) -> None:
    _check_changed_label(node, exported(OnnxRuntime("fp32")), tmp_path)
    _check_errors(node, eager_variant, tmp_path)


@pytest.fixture(scope="session")
def cpp(once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """The folder of the C++ programs that this machine can build."""
    if shutil.which("cmake") is None or shutil.which("g++") is None:
        pytest.skip("cmake or g++ is not installed")
    return once("cpp", _build)


def _build(folder: Path) -> None:
    import openvino
    import torch

    prefixes = [Path(openvino.__file__).parent / "cmake", torch.utils.cmake_prefix_path]
    done = _run(
        "cmake",
        *("-S", EXAMPLES / "cpp", "-B", folder),
        *("-DWITH_OPENVINO=ON", "-DWITH_LIBTORCH=ON"),
        f"-DCMAKE_PREFIX_PATH={';'.join(map(str, prefixes))}",
    )
    if done.returncode and (missing := re.search(r"nlohmann_json|ICU", done.stderr)):
        pytest.skip(f"cmake does not find {missing.group()}")
    assert done.returncode == 0, done.stderr
    done = _run("cmake", "--build", folder)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("variant", [OpenVino("fp32"), OpenVino("bf16"), AOTInductor("fp32")])
def test_cpp(
    cpp: Path, exported: Export, eager_variant: Path, tmp_path: Path, variant: Variant
) -> None:
    names = {"openvino": "score_openvino", "aotinductor": "score_libtorch"}
    program: list[object] = [cpp / names[variant.runtime]]
    folder = exported(variant)
    _check_scores(program, folder)
    _check_changed_label(program, folder, tmp_path)
    _check_errors(program, eager_variant, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("max_length", "side"), [(2, "right"), (3, "right"), (16, "left"), (128, "right")]
)
def test_cpp_token_ids(
    cpp: Path, tiny_model: Path, tmp_path: Path, max_length: int, side: str
) -> None:
    tokenizer = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    preprocessor = TextPreprocessor(
        tokenizer, max_length=max_length, pad_id=0, truncation_side=side
    )
    preprocessor.save(tmp_path)
    done = _run(cpp / "tokenize", tmp_path, *TEXTS)
    assert done.returncode == 0, done.stderr
    found = [[int(word) for word in line.split()] for line in done.stdout.splitlines()]
    for text, ids, expected in zip(TEXTS, found, preprocessor.encode(TEXTS), strict=True):
        assert ids == expected, repr(text)


@pytest.mark.slow
def test_cpp_refuses_other_tokenizers(cpp: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "card": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    TextPreprocessor(tokenizer, max_length=16, pad_id=0).save(tmp_path)
    done = _run(cpp / "tokenize", tmp_path, "card")
    assert done.returncode == 2
    assert done.stderr == (
        "error: tokenizer.json holds a model of type WordLevel, but this program knows BERT's "
        "WordPiece only. Use the Node example, or a tokenizer library.\n"
    )


def test_the_page_has_the_tolerances() -> None:
    page = (EXAMPLES.parent / "docs" / "concepts" / "artifact-format.md").read_text()
    rows = re.findall(r"^\| (`.*`) \| (0\.\d+) \|$", page, flags=re.MULTILINE)
    found = {name: float(value) for names, value in rows for name in re.findall(r"`(.+?)`", names)}
    assert found == golden._TOLERANCE
