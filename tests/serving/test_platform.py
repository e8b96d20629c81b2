"""Settings from the environment, and a server asked as each platform asks it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests
from tiny.artifact import SAVED
from tiny.server import START_S, until

from mlflow_pt_deploy.errors import ServingError
from mlflow_pt_deploy.serving.platform import default_model, routes_from, settings_from


@pytest.mark.parametrize(
    ("environment", "models", "expected"),
    [
        ({"PT_DEPLOY_MODEL": "models:/a@champion"}, (), "models:/a@champion"),
        ({}, ("/opt/ml/model",), "/opt/ml/model"),
        ({}, ("/mnt/models",), "/mnt/models"),
        ({"AZUREML_MODEL_DIR": "/azure"}, ("/azure", "/mnt/models"), "/azure"),
        ({"PT_DEPLOY_MODEL": "x"}, ("/opt/ml/model",), "x"),
    ],
)
def test_the_model_of_a_platform(
    environment: Mapping[str, str], models: tuple[str, ...], expected: str
) -> None:
    assert default_model(environment, models.__contains__) == expected


def test_a_model_in_the_only_subfolder(tmp_path: Path) -> None:
    (tmp_path / "shop" / "1").mkdir(parents=True)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "MLmodel").touch()
    found = default_model({"AZUREML_MODEL_DIR": str(tmp_path)})
    assert found == str(tmp_path / "model")


def test_without_a_model_the_message_says_where_one_may_come_from() -> None:
    with pytest.raises(ServingError, match=r"set PT_DEPLOY_MODEL.*/opt/ml/model or /mnt/models"):
        default_model({}, lambda folder: False)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, {}),
        ({"PORT": "8081"}, {"port": 8081}),
        ({"AIP_HTTP_PORT": "8082", "PORT": "1"}, {"port": 8082}),
        ({"PT_DEPLOY_PORT": "8083", "PORT": "1"}, {"port": 8083}),
        (
            {"PT_DEPLOY_HOST": "0.0.0.0", "PT_DEPLOY_INSECURE": "yes", "PT_DEPLOY_POLL_S": "0.5"},
            {"host": "0.0.0.0", "insecure": True, "poll_s": 0.5},
        ),
        ({"PT_DEPLOY_ACCESS_LOG": "0", "PT_DEPLOY_HOST": ""}, {"access_log": False}),
    ],
)
def test_settings(environment: Mapping[str, str], expected: dict[str, object]) -> None:
    assert settings_from(environment) == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"PORT": "http"}, "PORT is 'http'; it must be a whole number: TCP port"),
        ({"PT_DEPLOY_INSECURE": "maybe"}, "PT_DEPLOY_INSECURE is 'maybe'; it must be 1 or 0"),
        ({"PT_DEPLOY_HANG_S": "soon"}, "it must be a number"),
    ],
)
def test_wrong_values_name_the_variable(environment: Mapping[str, str], message: str) -> None:
    with pytest.raises(ServingError, match=message):
        settings_from(environment)


def test_routes() -> None:
    assert routes_from({}) == {}
    vertex = {"AIP_PREDICT_ROUTE": "/v1/endpoints/7:predict", "AIP_HEALTH_ROUTE": "/v1/health"}
    assert routes_from(vertex) == {
        "/v1/endpoints/7:predict": "/invocations",
        "/v1/health": "/readyz",
    }


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def server(tmp_path: Path, **environment: str) -> Iterator[None]:
    """``pt-deploy serve`` without any argument, as containers start it."""
    variables = {"TMPDIR": str(tmp_path), "PT_DEPLOY_REPLICAS": "1", **environment}
    with subprocess.Popen(
        [sys.executable, "-m", "mlflow_pt_deploy.cli", "serve"],
        env=os.environ | variables,
        stdout=subprocess.DEVNULL,
    ) as process:
        try:
            yield
        finally:
            process.terminate()
            assert process.wait(30) == 0


def answers(url: str, path: str) -> bool:
    try:
        return requests.get(url + path, timeout=5).status_code == 200
    except requests.ConnectionError:
        return False


@pytest.mark.parametrize("name", ["SageMaker", "Vertex AI", "Azure ML", "Cloud Run"])
def test_a_server_is_asked_as_the_platform_asks(name: str, tmp_path: Path) -> None:
    port = str(free_port())
    health, score = "/readyz", "/invocations"
    body: dict[str, object] = {"inputs": ["my card"]}
    environment = {"PORT": port, "PT_DEPLOY_MODEL": str(SAVED)}
    if name == "SageMaker":
        health = "/ping"
    elif name == "Vertex AI":
        health, score, body = "/health/v1", "/v1/models/shop:predict", {"instances": ["my card"]}
        environment |= {"AIP_HTTP_PORT": port, "AIP_HEALTH_ROUTE": health, "PORT": "1"}
        environment |= {"AIP_PREDICT_ROUTE": score}
    elif name == "Azure ML":
        del environment["PT_DEPLOY_MODEL"]
        environment["AZUREML_MODEL_DIR"] = str(SAVED.parent)
    url = f"http://127.0.0.1:{port}"
    with server(tmp_path, **environment):
        until(lambda: answers(url, health), START_S)
        found = requests.post(url + score, json=body, timeout=30).json()["predictions"]
    assert [row["label"] for row in found] == ["card"]


def test_a_public_address_without_a_token_is_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mlflow_pt_deploy.cli", "serve"],
        env=os.environ | {"PT_DEPLOY_MODEL": str(SAVED), "PT_DEPLOY_HOST": "0.0.0.0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "PT_DEPLOY_TOKEN is not set" in done.stderr
