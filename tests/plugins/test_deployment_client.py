"""``mlflow deployments -t pt-deploy`` with real servers, which outlive the starting process."""

import configparser
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa  # type: ignore[import-untyped]
import pytest
import requests
from click.testing import CliRunner
from mlflow.deployments import cli, interface
from mlflow.exceptions import MlflowException
from tiny.server import until
from tiny.serving import save_tiny

from mlflow_pt_deploy.model_config import ServingOptions
from mlflow_pt_deploy.option_fields import option_specs
from mlflow_pt_deploy.plugins import deployment_client as deployment
from mlflow_pt_deploy.plugins import local_servers as servers
from mlflow_pt_deploy.plugins.deployment_client import PtDeployClient
from mlflow_pt_deploy.serving.settings import ServerSettings
from mlflow_pt_deploy.system.paths import home

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let child processes import the tiny model, and stop all servers after the test."""
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    yield
    for name in servers.names():
        state = servers.read_state(name)
        assert state
        servers.stop(state, 5)


@pytest.fixture
def client() -> PtDeployClient:
    return PtDeployClient("pt-deploy")


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    return str(save_tiny(tmp_path / "one", label="one"))


def mlflow(*words: str) -> str:
    """Output of ``mlflow deployments ...``."""
    interface.plugin_store.register("pt-deploy", deployment.__name__)
    run = CliRunner().invoke(cli.commands, [*words[:1], "-t", "pt-deploy", *words[1:]])
    if run.exception:
        raise run.exception
    return run.output


def test_mlflow_finds_the_plugin() -> None:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    points = parser["options.entry_points"]["mlflow.deployments"]
    assert points.strip() == f"pt-deploy = {deployment.__name__}"
    text = mlflow("help")
    for spec in (*option_specs(ServingOptions), *option_specs(ServerSettings)):
        if spec.name not in ("tls_cert", "tls_key", "max_models", "max_memory_mb"):
            assert f"  {spec.name}{' (' if spec.default != '' else chr(10)}" in text
            assert spec.help in " ".join(text.split())
    assert "  port (0)\n" in text
    assert "  poll_s (1.0)\n" in text
    assert isinstance(interface.get_deploy_client("pt-deploy"), PtDeployClient)


def test_create_predict_update_and_delete(
    tracking: str, tiny: str, tmp_path: Path, client: PtDeployClient
) -> None:
    code = (
        "import sys; from mlflow_pt_deploy.plugins.deployment_client import PtDeployClient\n"
        "config = dict(num_threads='1')\n"
        "PtDeployClient('pt-deploy').create_deployment('shop', sys.argv[1], config=config)"
    )
    subprocess.run([sys.executable, "-c", code, tiny], check=True)
    with pytest.raises(MlflowException, match="deployment shop already exists"):
        client.create_deployment("shop", tiny)
    assert "shop" in mlflow("list")
    text = mlflow("get", "--name", "shop")
    assert "status: running" in text
    assert "'num_threads': 1" in text
    rows = tmp_path / "rows.json"
    pd.DataFrame({"text": ["red", "blue"]}).to_json(rows)
    answer = json.loads(mlflow("predict", "--name", "shop", "-I", str(rows)))
    assert [row["label"] for row in answer["predictions"]] == ["one", "blue"]
    assert client.predict("shop", ["red"]).get_predictions()["label"].tolist() == ["one"]
    for one in ("red", np.str_("red"), np.array("red"), ("red",), iter(["red"]), {"text": "red"}):
        assert client.predict("shop", one).get_predictions()["label"].tolist() == ["one"]
    dated = pd.DataFrame({"text": ["red", "blue"], "when": pd.Timestamp("2026-01-01")})
    for two in (
        dated,
        dated["text"],
        pa.table({"text": ["red", "blue"]}),
        {"text": ["red", "blue"]},
    ):
        assert client.predict("shop", two).get_predictions()["label"].tolist() == ["one", "blue"]
    for wrong, message in (
        ([], "'text' is empty"),
        (None, "inputs is None; give a text, a list of texts"),
        (7, "'text' row 0 is a number"),
        ([("red", "blue")], "pairs are not supported"),
        (pd.DataFrame({"text": ["red"], "text_pair": ["x"]}), "pairs are not supported"),
    ):
        with pytest.raises(MlflowException, match=message) as refused:
            client.predict("shop", wrong)
        assert refused.value.error_code == "INVALID_PARAMETER_VALUE"

    pid = servers.read_state("shop").pid  # type: ignore[union-attr]
    seen = _query_during(
        client,
        lambda: mlflow(
            "update",
            "--name",
            "shop",
            "-m",
            str(save_tiny(tmp_path / "two", label="two")),
            "-C",
            "max_batch_rows=4",
        ),
    )
    assert seen == {"one", "two"}
    now = client.get_deployment("shop")
    assert now["pid"] == pid
    assert now["served"]["model_config"] == {"num_threads": 1, "max_batch_rows": 4}

    bad = str(save_tiny(tmp_path / "bad", refuse="it answers differently here"))
    with pytest.raises(MlflowException, match="not updated: it answers differently here"):
        client.update_deployment("shop", bad)
    with pytest.raises(MlflowException, match="cannot be found in the registry"):
        client.update_deployment("shop", "models:/nothing@champion")
    assert client.predict("shop", ["red"])["predictions"][0]["label"] == "two"
    assert client.get_deployment("shop")["model_uri"].endswith("two")
    with pytest.raises(MlflowException, match="port cannot change while the server runs"):
        client.update_deployment("shop", config={"port": "5001"})

    assert "shop is deleted" in mlflow("delete", "--name", "shop")
    assert not (home() / "deployments" / "shop").exists()
    assert not servers._start_time(pid)  # dead; a zombie may stay if init does not reap it
    for gone in (client.get_deployment, client.delete_deployment, client.predict):
        with pytest.raises(
            MlflowException, match="deployment 'shop' does not exist; existing: none"
        ):
            gone("shop")


def _query_during(client: PtDeployClient, work: Any) -> set[str]:
    """Labels that clients received during `work`; no request may fail."""
    url, stop = client.get_deployment("shop")["url"], threading.Event()
    seen: set[str] = set()
    failed: list[str] = []

    def query() -> None:
        with requests.Session() as session:
            while not stop.is_set():
                answer = session.post(f"{url}/invocations", json={"inputs": ["red"]}, timeout=10)
                if answer.status_code != 200:
                    failed.append(answer.text)
                seen.add(answer.json()["predictions"][0]["label"])

    threads = [threading.Thread(target=query) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: seen)
        work()
        until(lambda: len(seen) == 2)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failed
    return seen


def test_a_dead_server_is_reported_and_restarted_with_its_tokens(
    tracking: str, tiny: str, client: PtDeployClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PT_DEPLOY_TOKEN", "score-score-score-score")
    monkeypatch.setenv("PT_DEPLOY_ADMIN_TOKEN", "admin-admin-admin-admin")
    url = client.create_deployment("shop", tiny)["url"]
    _check_tokens(client, url)
    first = servers.read_state("shop")
    assert first and first.alive
    os.kill(first.pid, signal.SIGKILL)
    until(lambda: not first.alive)
    assert client.list_deployments()[0]["status"].startswith("dead")
    until(lambda: _is_gone(client))  # the orphaned worker exits
    again = client.update_deployment("shop")
    assert again["status"] == "running"
    assert again["pid"] != first.pid
    _check_tokens(client, again["url"])
    monkeypatch.delenv("PT_DEPLOY_TOKEN")
    with pytest.raises(MlflowException, match="send a token"):
        client.predict("shop", ["red"])
    client.delete_deployment("shop")


def _is_gone(client: PtDeployClient) -> bool:
    try:
        client.predict("shop", ["red"])
    except MlflowException as error:
        return "does not answer" in str(error)
    return False


def _check_tokens(client: PtDeployClient, url: str) -> None:
    """Requests need a token; tokens are not written to disk."""
    assert client.predict("shop", ["red"])["predictions"][0]["label"] == "one"
    assert client.get_deployment("shop")["served"]["version"]
    answer = requests.post(f"{url}/invocations", json={"inputs": ["red"]}, timeout=5)
    assert answer.status_code == 401
    text = (home() / "deployments" / "shop" / "state.json").read_text()
    assert "score-score" not in text


def test_a_failed_creation_leaves_nothing(
    tracking: str, tmp_path: Path, client: PtDeployClient
) -> None:
    bad = str(save_tiny(tmp_path / "bad", refuse="it answers differently here"))
    with pytest.raises(MlflowException, match=r"the server exited; .*answers differently"):
        client.create_deployment("shop", bad)
    slow = str(save_tiny(tmp_path / "slow", load_s=60))
    with pytest.raises(MlflowException, match=r"not ready within 0.5 s \(ready_s\)"):
        client.create_deployment("shop", slow, config={"ready_s": "0.5"})
    assert client.list_deployments() == []
    assert not (home() / "deployments" / "shop").exists()


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("shop", {"threads": "2"}, "there is no option threads; options are host"),
        ("shop", {"port": "http"}, "port must be an integer, not 'http'"),
        ("shop", {"access_log": "1"}, "access_log must be true or false, not '1'"),
        ("shop", {"max_wait_ms": "soon"}, "max_wait_ms must be a number, not 'soon'"),
        ("shop", {"max_batch_rows": "0"}, "max_batch_rows must be a whole number of at least 1"),
        ("../shop", {}, "is not a valid deployment name"),
        ("", {}, "is not a valid deployment name"),
    ],
)
def test_options_and_names_are_checked(
    client: PtDeployClient, name: str, config: dict[str, str], message: str
) -> None:
    with pytest.raises(MlflowException, match=message):
        client.create_deployment(name, "models:/tiny@champion", config=config)
    with pytest.raises(MlflowException, match="serves the flavor pt_deploy, not sklearn"):
        client.create_deployment(name, "models:/tiny@champion", flavor="sklearn")


def test_run_local_reports_the_error(tmp_path: Path) -> None:
    bad = str(save_tiny(tmp_path / "bad", refuse="it answers differently here"))
    with pytest.raises(MlflowException, match="it answers differently here"):
        mlflow("run-local", "--name", "shop", "-m", bad)


def test_a_folder_without_a_model_is_rejected(tmp_path: Path, client: PtDeployClient) -> None:
    for folder, message in (
        (tmp_path / "none", r"none is not there\. Give a folder that MLflow saved"),
        (tmp_path, "is no MLflow model: it has no file MLmodel"),
    ):
        with pytest.raises(MlflowException, match=message) as refused:
            client.create_deployment("shop", str(folder))
        assert refused.value.error_code == "INVALID_PARAMETER_VALUE"
    assert client.list_deployments() == []
