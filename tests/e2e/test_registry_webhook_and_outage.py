"""A real `mlflow server`: its webhook swaps both replicas, and its outage does not stop a start."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from cryptography.fernet import Fernet
from mlflow import MlflowClient
from tiny.mlflow_server import end, free_port, mlflow_server
from tiny.server import Served, started, until
from tiny.serving import save_tiny

pytestmark = pytest.mark.slow

URI = "models:/tiny@champion"
SECRET = "a secret of 16 or more"


@pytest.fixture
def folder(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the MLflow server, whose webhooks may reach this machine."""
    shutil.copyfile(empty_database, tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_WEBHOOK_ALLOWED_SCHEMES", "http")
    monkeypatch.setenv("MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS", "true")
    monkeypatch.setenv("MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY", Fernet.generate_key().decode())
    monkeypatch.setenv("MLFLOW_WEBHOOK_CACHE_TTL", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    yield tmp_path


def register(client: MlflowClient, folder: Path) -> None:
    """Three versions; a client of a server may not name folders of this machine."""
    client.create_registered_model("tiny")
    for label in ("one", "two", "three"):
        client.create_model_version("tiny", str(save_tiny(folder / label, label=label)))
    client.set_registered_model_alias("tiny", "champion", "1")


def replicas(served: Served) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = requests.get(f"{served.url}/model", timeout=10).json()["replicas"]
    return found


def both_serve(served: Served, version: str) -> bool:
    return [each.get("version") for each in replicas(served)] == [version, version]


def test_a_webhook_swaps_at_once_and_a_start_survives_an_outage(folder: Path) -> None:
    port = free_port()
    store = f"sqlite:///{folder}/mlflow.db"
    register(MlflowClient(store, store), folder)
    with mlflow_server(folder, store, port=port) as (url, process):
        client = MlflowClient(url, url)
        variables = {
            "MLFLOW_TRACKING_URI": url,
            "MLFLOW_REGISTRY_URI": url,
            "PT_DEPLOY_WEBHOOK_SECRET": SECRET,
            "PT_DEPLOY_HOME": str(folder / "home"),
        }
        with started(
            folder / "first", URI, "--replicas", "2", "--poll-s", "3600", **variables
        ) as served:
            until(lambda: both_serve(served, "1"), 60)
            hook = client.create_webhook(
                "pt-deploy",
                f"{served.url}/webhook",
                ["model_version_alias.created", "model_version_alias.deleted"],
                secret=SECRET,
            )
            assert client.test_webhook(hook.webhook_id).success
            start = time.monotonic()
            client.set_registered_model_alias("tiny", "champion", "2")
            until(lambda: both_serve(served, "2"), 60)
            print(f"the promotion arrived after {time.monotonic() - start:.1f} s")
            end(process)
            until(lambda: list((folder / "home").glob("served/*/2-*")), 60)
        start = time.monotonic()
        with started(
            folder / "second", URI, "--replicas", "2", "--poll-s", "0.5", **variables
        ) as served:
            print(f"the start in an outage took {time.monotonic() - start:.1f} s")
            assert "version 2 (from the copy of 20" in served.banner
            assert "version 2 is served from the copy of 20" in served.log
            body = requests.post(
                f"{served.url}/invocations", json={"inputs": ["red"]}, timeout=10
            ).json()
            assert body["predictions"][0]["label"] == "two"
            for each in replicas(served):
                assert each["served_from_copy"] and each["registry_lost_since"]
            with mlflow_server(folder, store, port=port):
                client.set_registered_model_alias("tiny", "champion", "3")
                until(lambda: both_serve(served, "3"), 60)
            assert "the registry answers again" in served.log
