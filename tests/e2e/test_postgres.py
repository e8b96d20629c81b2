"""The whole pipeline against a team's MLflow: PostgreSQL, basic auth, proxied artifacts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
import requests
from mlflow import MlflowClient
from tiny.artifact import SAVED
from tiny.mlflow_server import (
    ADMIN,
    PASSWORD,
    create_database,
    end,
    free_port,
    mlflow_server,
    postgres,
    postgres_programs,
)
from tiny.server import until

from mlflow_pt_deploy import flavor
from mlflow_pt_deploy.registry.promotion import Candidate, promote

pytest.importorskip("psycopg")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(postgres_programs() is None, reason="PostgreSQL is not installed"),
]


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with postgres(tmp_path_factory.mktemp("postgres") / "cluster") as server:
        yield server


def environment(url: str, tmp_path: Path) -> dict[str, str]:
    return os.environ | {
        "MLFLOW_TRACKING_URI": url,
        "MLFLOW_REGISTRY_URI": "",
        "MLFLOW_TRACKING_USERNAME": ADMIN,
        "MLFLOW_TRACKING_PASSWORD": PASSWORD,
        "PT_DEPLOY_HOME": str(tmp_path / "home"),
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",  # the restart takes seconds, not minutes
    }


def command(*words: str, env: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "mlflow_pt_deploy.cli", *words, "--json"],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def result(process: subprocess.Popen[str]) -> dict:
    out, _ = process.communicate(timeout=400)
    assert process.returncode == 0, out[-4000:]
    return json.loads(out.strip().splitlines()[-1])


def running_count(url: str) -> int:
    """Runs in the default experiment."""
    found = requests.post(
        f"{url}/api/2.0/mlflow/runs/search",
        json={"experiment_ids": ["0"]},
        timeout=30,
    )
    return len(found.json().get("runs", ()))


def lifecycle(data: Path, model: Path, name: str) -> tuple[str, ...]:
    options = {
        "data": data,
        "teacher": model,
        "name": name,
        "epochs": 1,
        "student-epochs": 0,
        "static-epochs": 1,
        "learning-rate": 0.01,
        "seconds": 0.1,
        "threads": 1,
        "retain": 0.1,
        "variants": "numpy",
    }
    flags = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    return ("run", *flags)


def test_two_lifecycles_at_once_and_a_server_restarted_in_the_middle(
    database: str, tiny_data: Path, tiny_model: Path, tmp_path: Path
) -> None:
    store, port = create_database(database, "runs"), free_port()
    with mlflow_server(tmp_path, store, port=port) as (url, server):
        env = environment(url, tmp_path)
        running = [command(*lifecycle(tiny_data, tiny_model, name), env=env) for name in "ab"]
        until(lambda: running_count(url) >= 4, 120)  # two parents, two trainings
        end(server)
    with mlflow_server(tmp_path, store, port=port):
        documents = [result(process) for process in running]
    assert [each["promoted"]["uri"] for each in documents] == [
        "models:/a@champion",
        "models:/b@champion",
    ]


def test_a_rollback_behind_basic_auth(database: str, tmp_path: Path) -> None:
    """The versions are made without the server, which hashes the password at every request."""
    store, auth = create_database(database, "team"), create_database(database, "auth")
    mlflow.set_tracking_uri(store)
    mlflow.set_registry_uri(store)
    try:
        client = MlflowClient()
        experiment = client.create_experiment("team", str(tmp_path / "artifacts"))
        for text in ("first", "second"):
            with mlflow.start_run(experiment_id=experiment):
                info = flavor.log_model(SAVED / "variant", text)
            promote(Candidate(f"models:/{info.model_id}", text), "team", text)
    finally:
        mlflow.set_tracking_uri(None)
        mlflow.set_registry_uri(None)
    with mlflow_server(tmp_path, store, auth=auth) as (url, _):
        env = environment(url, tmp_path)
        wrong = command("history", "team", env=env | {"MLFLOW_TRACKING_PASSWORD": "wrong"})
        assert result(command("rollback", "team", env=env))["version"] == "1"
        shown = result(command("history", "team", env=env))
        assert [event["action"] for event in shown["events"]] == ["promote", "promote", "rollback"]
        assert shown["events"][2]["who"] == ADMIN
        out, _ = wrong.communicate(timeout=200)
        assert wrong.returncode == 1
        assert "the history of team cannot be read" in out and "Traceback" not in out


def test_a_search_of_two_processes_over_postgres(
    database: str, tiny_data: Path, tiny_model: Path, tmp_path: Path, tracking: str
) -> None:
    storage = create_database(database, "studies")
    env = os.environ | {
        "MLFLOW_TRACKING_URI": tracking,
        "PT_DEPLOY_STORAGE": storage,
        "PT_DEPLOY_HOME": str(tmp_path / "home"),
    }
    mlflow.set_experiment("search")
    words = ("search", "--teacher", str(tiny_model), "--data", str(tiny_data), "--study", "shared")
    words += ("--trials", "2", "--seconds", "0.1", "--kinds", "static", "--retain", "0.1")
    running = [command(*words, env=env) for _ in range(2)]
    documents = [result(process) for process in running]
    assert {each["finished"] for each in documents} <= {2, 3}
    assert all(each["chosen"] for each in documents)
