"""``pt-deploy package``: what it writes, and what it refuses."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from tiny.artifact import SAVED, copy_saved

from mlflow_pt_deploy.artifacts import verify
from mlflow_pt_deploy.cli import main
from mlflow_pt_deploy.errors import ModelError
from mlflow_pt_deploy.packaging import TARGETS
from mlflow_pt_deploy.packaging.pins import pin_closure
from mlflow_pt_deploy.registry.addresses import ModelSpec, ResolvedVersion
from mlflow_pt_deploy.serving.model.loaded_model import load_version


def package(target: str, out: Path, *words: str, uri: str = str(SAVED)) -> None:
    assert main(["package", uri, "--target", target, "--out", str(out), *words]) == 0


@pytest.mark.parametrize("target", TARGETS)
def test_a_folder_is_complete_and_readable_by_any_user(target: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    package(target, out, "--image", "registry.local/shop:7")
    names = {path.relative_to(out).parts[0] for path in out.rglob("*")}
    assert {"model", "wheels", "requirements.txt", "Dockerfile", "README.md"} <= names
    for path in out.rglob("*"):
        wanted = 0o755 if path.is_dir() else 0o644
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path
    verify(out / "model" / "variant")
    text = (out / "README.md").read_text() + (out / "Dockerfile").read_text()
    assert "%{" not in text and "registry.local/shop:7" in text
    assert "USER 1000" in text or target == "lambda"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_requirements_are_exact_and_slim(tmp_path: Path) -> None:
    package("docker", tmp_path / "out")
    pins = dict(
        line.split("==") for line in (tmp_path / "out/requirements.txt").read_text().splitlines()
    )
    assert {"mlflow-pt-deploy", "mlflow-skinny", "numpy", "tokenizers", "granian"} <= pins.keys()
    assert not {"torch", "transformers", "mlflow", "scipy", "matplotlib"} & pins.keys()


def test_a_function_needs_neither_mlflow_nor_a_server(tmp_path: Path) -> None:
    package("lambda", tmp_path / "out")
    text = (tmp_path / "out/requirements.txt").read_text()
    assert "mlflow-pt-deploy==" in text and "numpy==" in text
    assert not {"mlflow-skinny", "granian", "pandas"} & set(text.replace("==", "\n").splitlines())


def test_the_wheel_installs_this_package(tmp_path: Path) -> None:
    package("docker", tmp_path / "out")
    (wheel,) = (tmp_path / "out" / "wheels").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "unpacked")
    assert "mlflow_pt_deploy/reporting/report.html.j2" in names
    assert "mlflow_pt_deploy/packaging/templates/deployment.yaml" in names
    assert not [name for name in names if name.endswith(".pyc")]
    (info,) = (tmp_path / "unpacked").glob("*.dist-info")
    assert "Name: mlflow-pt-deploy\nVersion: 0.1.0" in (info / "METADATA").read_text()
    assert "pt-deploy = mlflow_pt_deploy.cli:main" in (info / "entry_points.txt").read_text()
    done = subprocess.run(
        [sys.executable, "-c", "import mlflow_pt_deploy as p; print(p.__file__)"],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "unpacked")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(str(tmp_path / "unpacked"))


@pytest.mark.parametrize("target", ["kubernetes", "kserve"])
def test_kubernetes_objects_are_valid(target: str, tmp_path: Path) -> None:
    package(target, tmp_path / "out")
    objects = {p.name: yaml.safe_load(p.read_text()) for p in (tmp_path / "out").glob("*.yaml")}
    if target == "kserve":
        predictor = objects["inferenceservice.yaml"]["spec"]["predictor"]
        assert predictor["containers"][0]["name"] == "kserve-container"
        return
    validate = pytest.importorskip("kubernetes_validate")
    resources = objects.pop("kustomization.yaml")["resources"]
    assert sorted(resources) == sorted(objects)
    for each in objects.values():
        validate.validate(each, "1.31", strict=True)
    spec = objects["deployment.yaml"]["spec"]["template"]["spec"]
    drain_and_grace = 5 + 30
    assert spec["terminationGracePeriodSeconds"] > drain_and_grace
    memory = spec["containers"][0]["resources"]["requests"]["memory"]
    assert 160 < int(memory.removesuffix("Mi")) < 1024


_UNKNOWN_FIELDS = """\
import sys, yaml, kserve.models, kubernetes.client.models as kubernetes

def unknown(data, kind, path=""):
    if kind.startswith("list["):
        return [each for part in data for each in unknown(part, kind[5:-1], path)]
    found = getattr(kserve.models, kind, None) or getattr(kubernetes, kind, None)
    if found is None:
        return []
    names = {shown: name for name, shown in found.attribute_map.items()}
    wrong = [f"{path}.{key}" for key in data if key not in names]
    for key in data.keys() & names.keys():
        wrong += unknown(data[key], found.openapi_types[names[key]], f"{path}.{key}")
    return wrong

print(unknown(yaml.safe_load(open(sys.argv[1])), "V1beta1InferenceService"))
"""


def test_an_inference_service_has_the_fields_of_kserve(tmp_path: Path) -> None:
    if not (python := os.environ.get("PT_DEPLOY_CLIENTS")):
        pytest.skip("PT_DEPLOY_CLIENTS names no Python that has kserve")
    package("kserve", tmp_path / "out")
    words = [python, "-c", _UNKNOWN_FIELDS, str(tmp_path / "out" / "inferenceservice.yaml")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_golden_rows_are_replaced_on_request(tmp_path: Path) -> None:
    before = (SAVED / "variant" / "golden.json").read_text()
    package("docker", tmp_path / "out", "--without-golden-rows")
    model = tmp_path / "out" / "model"
    after = json.loads((model / "variant" / "golden.json").read_text())
    assert not set(json.loads(before)["rows"]) & set(after["rows"])
    version = load_version(ResolvedVersion(str(model)), ModelSpec(str(model)))
    assert version.pyfunc.predict(["my card"])[0]["label"] == "card"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nowhere",), "the model cannot be fetched or opened"),
        ((str(SAVED.parent),), "is not an MLflow model: it has no MLmodel file"),
        (("models:/none@champion",), "cannot be fetched or opened"),
    ],
)
def test_what_is_no_model_of_ours_is_refused(
    words: tuple[str, ...],
    message: str,
    tmp_path: Path,
    tracking: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["package", *words, "--out", str(tmp_path / "out")]) == 1
    shown = capsys.readouterr().err
    assert message in shown and "Traceback" not in shown
    assert {path.name for path in tmp_path.iterdir()} <= {"mlflow.db"}


def test_a_folder_that_exists_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").touch()
    assert main(["package", str(SAVED), "--out", str(tmp_path)]) == 1
    assert "exists and is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_changed_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = copy_saved(tmp_path)
    (changed / "variant" / "labels.json").write_text('["a", "b", "c"]')
    assert main(["package", str(changed), "--out", str(tmp_path / "out")]) == 1
    assert "labels.json is not the file that was exported" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_pins_are_of_what_is_installed() -> None:
    pins = pin_closure(["pytest"])
    assert f"pytest=={pytest.__version__}" in pins
    assert any(pin.startswith("pluggy==") for pin in pins)
    with pytest.raises(ModelError, match="no-such-library is not installed"):
        pin_closure(["no-such-library"])
    with pytest.raises(ModelError, match=f"needs pytest<1, and {pytest.__version__} is installed"):
        pin_closure(["pytest<1"])
