"""An MLmodel file can neither run code nor lift a restriction."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.exceptions import MlflowException
from tiny.artifact import SAVED, copy_saved, edit_mlmodel, in_pyfunc

from mlflow_pt_deploy import flavor
from mlflow_pt_deploy.errors import ArtifactError, ModelError, ServingError, UntrustedError
from mlflow_pt_deploy.registry.addresses import (
    ModelSpec,
    ResolvedVersion,
)
from mlflow_pt_deploy.registry.mlmodel import MAX_BYTES
from mlflow_pt_deploy.serving.model.loaded_model import LoadedModel, check_exists, load_version

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return copy_saved(tmp_path)


def load(root: Path, **model_config: Any) -> LoadedModel:
    return load_version(ResolvedVersion(str(root)), ModelSpec(str(root), model_config))


def in_flavor(**keys: object) -> Edit:
    return lambda content: content["flavors"]["pt_deploy"].update(keys)


def in_flavors(**keys: object) -> Edit:
    return lambda content: content["flavors"].update(keys)


def at_top(**keys: object) -> Edit:
    return lambda content: content.update(keys)


REJECTED: dict[str, tuple[Edit, str]] = {
    "another loader": (in_pyfunc(loader_module="os"), "loader_module is os instead of"),
    "a loader that is a list": (in_pyfunc(loader_module=["mlflow_pt_deploy.flavor"]), "loader_mod"),
    "a submodule": (in_pyfunc(loader_module="mlflow_pt_deploy.flavor.x"), "loader_module"),
    "mlflow's own loader": (in_pyfunc(loader_module="mlflow.pyfunc.model"), "loader_module"),
    "code": (in_pyfunc(code="code"), "python_function.code is not written by pt-deploy"),
    "code paths": (in_pyfunc(model_code_path="model.py"), "model_code_path"),
    "a pickled model": (in_pyfunc(python_model="python_model.pkl"), "python_model"),
    "another folder": (in_pyfunc(data="variant"), "python_function.data"),
    "another method": (in_pyfunc(predict_fn="__init__"), "predict_fn"),
    "another environment": (in_pyfunc(env={"conda": "../conda.yaml"}), "env names other files"),
    "a python version": (in_pyfunc(python_version=["3.11"]), "python_version"),
    "options": (in_pyfunc(config={"threads": 2}), "model_config has no threads"),
    "an option's type": (in_pyfunc(config={"num_threads": "many"}), "num_threads must be"),
    "options of numbers": (in_pyfunc(config={1: 2}), "config is not a mapping"),
    "options in a list": (in_pyfunc(config=["allow_code"]), "config is not a mapping"),
    "another flavor": (in_flavors(sklearn={"code": "code"}), "flavors.sklearn"),
    "no python_function": (lambda c: c["flavors"].pop("python_function"), "python_function is mis"),
    "our flavor's code": (in_flavor(code="code"), "pt_deploy.code"),
    "our flavor's folder": (in_flavor(data="../other"), "pt_deploy.data is ../other instead"),
    "our flavor's digest": (in_flavor(digest=["0"]), "pt_deploy.digest is not a string"),
    "our flavor as a text": (in_flavors(pt_deploy="yes"), "flavors.pt_deploy is not a mapping"),
    "onnx code": (in_flavors(onnx={"data": "variant/model.onnx", "code": "code"}), "onnx.code"),
    "onnx elsewhere": (in_flavors(onnx={"data": "../model.onnx"}), "onnx.data"),
    "onnx in a list": (in_flavors(onnx=["code"]), "flavors.onnx"),
    "flavors in a list": (at_top(flavors=["python_function"]), "flavors is missing"),
    "no flavors": (at_top(flavors={}), "flavors is missing"),
    "an unknown key": (at_top(hook="os.system"), "hook is not written by pt-deploy"),
    "a signature": (at_top(signature={"inputs": "["}), "signature cannot be read"),
    "a signature's type": (at_top(signature=7), "signature cannot be read"),
}


@pytest.mark.parametrize("case", REJECTED)
def test_unexpected_content_is_rejected(saved: Path, case: str) -> None:
    edit, message = REJECTED[case]
    edit_mlmodel(saved, edit)
    with pytest.raises(ArtifactError, match=message):
        load(saved)
    for call in (
        flavor.load_model,
        flavor._load_pyfunc,
    ):  # MLflow calls the latter after executing the file
        with pytest.raises(ArtifactError, match=message):
            call(str(saved))


def test_keys_without_effect_are_accepted(saved: Path) -> None:
    edit_mlmodel(saved, in_pyfunc(code=None, streamable=False))
    edit_mlmodel(saved, at_top(metadata={"code": ["of", "conduct"]}, prompts=None, later=None))
    assert load(saved).name == "student-numpy-fp32"


def test_code_in_an_artifact_does_not_run(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (saved / "code").mkdir()
    program = "import os\nos.environ['PWNED'] = '1'\nfrom mlflow_pt_deploy.flavor import *\n"
    (saved / "code" / "evil_loader.py").write_text(program)
    edit_mlmodel(saved, in_pyfunc(loader_module="evil_loader", code="code"))
    monkeypatch.delenv("PWNED", raising=False)
    for call in (load, lambda root: flavor.load_model(str(root))):
        with pytest.raises(ArtifactError, match="loader_module is evil_loader instead of mlflow_"):
            call(saved)
    with pytest.raises(ArtifactError, match="loader_module is evil_loader"):
        check_exists(ResolvedVersion(str(saved)))
    assert "PWNED" not in os.environ


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{new}: &{new} {{<<: [{', '.join([f'*{old}'] * 9)}]}}\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not a YAML mapping"),
        (b"\xff\xfe\x00", "not readable YAML"),
        (b"[1, 2]", "not a YAML mapping"),
        (b"a: !!python/object/apply:os.system ['true']", "not readable YAML"),
        (b"[" * 5000, "not readable YAML"),
        (b"{a: " * 5000, "not readable YAML"),
        (b"flavors: {}\nflavors: {}", "a key twice"),
        (b"? [a]\n: b", "not readable YAML"),
        (b"a: " + b"9" * 10_000, "not readable YAML"),
        (b"a: 2026-99-99", "not readable YAML"),
        (b"a: *nothing", "not readable YAML"),
        (b"#" * (MAX_BYTES + 1), "larger than"),
        (BOMB.encode(), "flavors is missing"),
        (MERGES.encode(), r"merge key \(<<\)"),
    ],
)
def test_invalid_files_are_rejected_quickly(saved: Path, text: bytes, message: str) -> None:
    (saved / "MLmodel").write_bytes(text)
    start = time.monotonic()
    with pytest.raises(ArtifactError, match=message) as caught:
        load(saved)
    assert time.monotonic() - start < 5
    assert len(str(caught.value)) < 500


def test_multiplying_aliases_are_not_expanded(saved: Path) -> None:
    path = saved / "MLmodel"
    path.write_text(
        path.read_text() + "metadata:\n" + "".join(f"  {x}\n" for x in BOMB.split("\n"))
    )
    start = time.monotonic()
    load(saved)
    assert time.monotonic() - start < 5


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="it has no MLmodel file"):
        load(tmp_path)
    with pytest.raises(MlflowException, match=r"nowhere does not exist\."):
        load(tmp_path / "nowhere")


def test_a_model_of_another_flavor(saved: Path) -> None:
    edit_mlmodel(saved, lambda content: content["flavors"].pop("pt_deploy"))
    with pytest.raises(ModelError, match="does not have the pt_deploy flavor"):
        load(saved)


def test_an_artifact_cannot_allow_its_own_code(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_mlmodel(saved, in_pyfunc(config={"allow_code": True}))
    with pytest.raises(
        UntrustedError, match="only the operator can allow code, with -C allow_code"
    ):
        load(saved)
    for call in (flavor.load_model, mlflow.pyfunc.load_model):
        with pytest.raises(UntrustedError, match="MLmodel file sets allow_code: true"):
            call(str(saved))
    assert load(saved, allow_code=True)
    monkeypatch.setenv("MLFLOW_PYFUNC_INFERENCE_CONFIG", json.dumps({"allow_code": True}))
    mlflow.pyfunc.load_model(str(saved))
    monkeypatch.setenv("MLFLOW_PYFUNC_INFERENCE_CONFIG", "{")
    with pytest.raises(ServingError, match="MLFLOW_PYFUNC_INFERENCE_CONFIG is not a JSON object"):
        load(saved)
    monkeypatch.delenv("MLFLOW_PYFUNC_INFERENCE_CONFIG")
    monkeypatch.setenv("PT_DEPLOY_ALLOW_CODE", "1")
    mlflow.pyfunc.load_model(str(saved))
    assert load(saved)


def test_allow_code_is_not_logged_with_a_model(tmp_path: Path) -> None:
    with pytest.raises(ServingError, match="allow_code cannot be logged .* -C allow_code=true"):
        flavor.save_model(SAVED / "variant", tmp_path / "m", model_config={"allow_code": True})
    assert not (tmp_path / "m").exists()


def test_options_of_the_operator_override_those_of_the_artifact(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_mlmodel(saved, in_pyfunc(config={"max_batch_rows": 4, "queue_rows": 8}))
    monkeypatch.setenv("MLFLOW_PYFUNC_INFERENCE_CONFIG", json.dumps({"queue_rows": 16}))
    options = load(saved, deadline_ms=50).pyfunc.options
    assert (options.max_batch_rows, options.queue_rows, options.deadline_ms) == (4, 16, 50)


def test_a_model_changed_after_logging(saved: Path) -> None:
    path = saved / "variant" / "manifest.json"
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(ArtifactError, match=r"manifest.json is not the one that was logged"):
        load(saved)
