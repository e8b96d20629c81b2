"""The package runs as in a container: uid 1000, read-only, no capabilities (bubblewrap)."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import requests
from tiny.artifact import SAVED

from mlflow_pt_deploy.packaging.package import write_package

BWRAP = shutil.which("bwrap")
_ROOT = Path(__file__).parents[2]


def sandbox(model: Path) -> list[str]:
    """Everything read-only, the package's folder as a container's root has it, another user."""
    words = [BWRAP or "", "--ro-bind", "/", "/", "--tmpfs", "/tmp", "--tmpfs", "/opt"]
    words += ["--ro-bind", str(model), "/opt/ml/model", "--dev", "/dev", "--proc", "/proc"]
    for path in {sys.prefix, sys.base_prefix}:  # they may lie where the image has nothing
        words += ["--ro-bind", path, path]
    words += ["--ro-bind", str(_ROOT), "/tmp/code", "--unshare-user", "--uid", "1000"]
    return [
        *words,
        "--gid",
        "1000",
        "--unshare-pid",
        "--as-pid-1",
        "--die-with-parent",
        "--cap-drop",
        "ALL",
        "--chdir",
        "/",
    ]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    if BWRAP is None:
        pytest.skip("bubblewrap is not installed")
    out = tmp_path / "out"
    write_package(str(SAVED), "docker", out)
    tried = subprocess.run([*sandbox(out / "model"), "true"], capture_output=True, check=False)
    if tried.returncode:
        pytest.skip(f"bubblewrap cannot run here: {tried.stderr.decode().strip()}")
    return out / "model"


def test_the_server_of_an_image_answers_and_ends(model: Path) -> None:
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": "/tmp/code",
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": "/tmp",
        "PT_DEPLOY_HOST": "0.0.0.0",
        "PT_DEPLOY_INSECURE": "1",
        "PT_DEPLOY_REPLICAS": "1",
        "PT_DEPLOY_PORT": "0",
    }
    command = [sys.executable, "-m", "mlflow_pt_deploy.cli", "serve"]
    with subprocess.Popen(
        [*sandbox(model), *command], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            ask_and_end(process)
        finally:
            process.kill()


def ask_and_end(process: subprocess.Popen[str]) -> None:
    """Score a row, then end the server, which is process 1 of its namespace."""
    assert process.stdout
    url = process.stdout.readline().split(" on ")[1].split()[0].replace("0.0.0.0", "127.0.0.1")
    body = {"inputs": ["my card"]}
    answer = requests.post(f"{url}/invocations", json=body, timeout=30)
    assert answer.json()["predictions"][0]["label"] == "card"
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    os.kill(int(children[0]), signal.SIGTERM)
    assert process.wait(30) == 0
