"""Serving without PyTorch, transformers, SciPy and the full MLflow."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
import requests
from tiny.artifact import SAVED

from mlflow_pt_deploy import flavor

# What the extras bring; an import of one of them fails in the child.
_ABSENT = (
    "alembic", "flask", "graphene", "gunicorn", "matplotlib", "optuna", "pyarrow", "scipy",
    "skops", "sklearn", "sqlalchemy", "torch", "tqdm", "transformers",
)  # fmt: skip
_BLOCKER = f"""\
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {_ABSENT!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
"""


def serve(python: Path | str, model: str, environment: dict[str, str]) -> dict:
    """Serve a model, score a row, end the server; returns the answer and the worker's modules."""
    with subprocess.Popen(
        [str(python), "-m", "mlflow_pt_deploy.cli", "serve", model, "--port", "0"],
        env=environment | {"PT_DEPLOY_REPLICAS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        url = process.stdout.readline().split(" on ")[1].split()[0]
        body = {"inputs": ["my card"]}
        answer = requests.post(f"{url}/invocations", json=body, timeout=30).json()
        csv = requests.post(
            f"{url}/invocations",
            data="text\nmy card\n",
            headers={"Content-Type": "text/csv"},
            timeout=30,
        )
        assert csv.json() == answer
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    return answer


def test_a_static_model_is_served_where_the_extras_are_absent(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(_BLOCKER)
    root = str(Path(flavor.__file__).parents[1])
    path = os.pathsep.join([str(tmp_path), root])
    answer = serve(sys.executable, str(SAVED), os.environ | {"PYTHONPATH": path})
    assert [row["label"] for row in answer["predictions"]] == ["card"]


def test_what_an_extra_is_needed_for_names_it(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(_BLOCKER)
    root = str(Path(flavor.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-m", "mlflow_pt_deploy.cli", "run", "--data", "digits"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), root])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "is not installed. Install it with: pip install 'mlflow-pt-deploy[train]'" in done.stderr


def test_a_model_names_its_runtime_only_and_carries_the_wheel(
    tracking: str, tmp_path: Path
) -> None:
    with mlflow.start_run():
        uri = flavor.log_model(SAVED / "variant", "model").model_uri
        other = flavor.log_model(SAVED / "variant", "other", package="https://x.test/p.whl")
    root = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(tmp_path)))
    lines = (root / "requirements.txt").read_text().splitlines()
    assert lines[:2] == ["--find-links wheels", "mlflow-pt-deploy==0.1.0"]
    assert {line.partition("==")[0] for line in lines[2:]} == {
        "mlflow-skinny",
        "numpy",
        "tokenizers",
    }
    assert [path.name for path in (root / "wheels").iterdir()] == [
        "mlflow_pt_deploy-0.1.0-py3-none-any.whl"
    ]
    assert mlflow.pyfunc.load_model(uri).predict(["my card"])[0]["label"] == "card"
    assert mlflow.pyfunc.get_model_dependencies(uri)
    found = mlflow.artifacts.download_artifacts(other.model_uri, dst_path=str(tmp_path / "other"))
    text = Path(found, "requirements.txt").read_text()
    assert "https://x.test/p.whl" in text and "find-links" not in text


@pytest.mark.slow
def test_an_environment_is_built_from_a_model_alone(tracking: str, tmp_path: Path) -> None:
    with mlflow.start_run():
        uri = flavor.log_model(SAVED / "variant", "model").model_uri
    root = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(tmp_path / "model")))
    home = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    python = home / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet", "-r"]
    # from another folder, as MLflow's containers install it
    subprocess.run([*pip, str(root / "requirements.txt")], check=True, cwd=tmp_path)
    shown = subprocess.run(
        [str(python), "-m", "pip", "list", "--format", "json"],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    installed = {each["name"].lower() for each in json.loads(shown)}
    assert {"mlflow-pt-deploy", "mlflow-skinny", "granian"} <= installed
    assert not {"torch", "transformers", "mlflow", "scipy"} & installed
    size_mb = sum(p.stat().st_size for p in home.rglob("*") if p.is_file()) / 1e6
    assert size_mb < 450
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    answer = serve(python, str(root), environment)
    assert [row["label"] for row in answer["predictions"]] == ["card"]
    shutil.rmtree(home)
