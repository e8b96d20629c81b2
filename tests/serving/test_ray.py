"""The server as a Ray Serve application, on a real local Ray: two replicas, swaps under load."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import requests
import yaml
from mlflow import MlflowClient
from tiny.registry import new_registry, register_tiny
from tiny.server import until

from mlflow_pt_deploy.errors import MissingExtraError, ServingError
from mlflow_pt_deploy.serving.ray import NAME, AppOptions, _split, app

START_S = 300
TESTS = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"port": "80"}, "port: Ray Serve does this. .* the settings here are poll_s, hang_s,"),
        (
            {"feedback_rows": 9},
            "feedback_rows: Ray's replicas share no counts or answers. Leave it",
        ),
        ({"max_batch": 4}, "model_config has no max_batch; it has max_batch_rows"),
        ({"poll_s": "-1"}, "poll_s is -1; give seconds from 0"),
        ({"poll_s": "often"}, "poll_s is 'often'; give a number"),
        ({"access_log": 1}, "access_log is 1; give true or false"),
        ({"canary": 5}, "canary is 5; give a text"),
        ({"canary": "models:/m@c=0%"}, "give more than 0% and at most 100%"),
        ({"num_threads": "many"}, "num_threads must be a whole number of at least 0, not 'many'"),
    ],
)
def test_a_wrong_argument_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ServingError, match=message):
        _split(given)


def test_arguments_of_the_command_line_are_texts() -> None:
    settings, options = _split({"poll_s": "0.5", "access_log": "true", "num_threads": "2"})
    assert (settings.poll_s, settings.access_log) == (0.5, True)
    assert options == {"num_threads": 2}
    assert _split({"canary": "models:/m@challenger=5%"})[0].canary == "models:/m@challenger=5%"
    assert AppOptions(model="models:/m@champion", num_replicas="2").num_replicas == 2


def test_ray_is_an_extra() -> None:
    try:
        import ray  # noqa: F401
    except ImportError:
        with pytest.raises(MissingExtraError, match=r"mlflow-pt-deploy\[ray\]"):
            app(AppOptions(model="models:/tiny@champion"))


class Registry(NamedTuple):
    client: MlflowClient
    uri: str

    def move(self, version: str) -> None:
        self.client.set_registered_model_alias("tiny", "champion", version)


@pytest.fixture(scope="module")
def registry(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """A registered model; version 2 calls its first class rouge."""

    folder = tmp_path_factory.mktemp("ray")
    found = Registry(*new_registry(folder, empty_database))
    habits = ({"label": label, "predict_s": 0.002, "slow_s": 600} for label in ("red", "rouge"))
    register_tiny(found.client, folder, *habits)
    return found


@pytest.fixture(scope="module")
def url(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where ``serve run`` serves two replicas under a path, on a Ray of its own."""
    pytest.importorskip("ray", reason="needs the extra ray")
    folder = tmp_path_factory.mktemp("serve")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    application = {
        "name": "tiny",
        "route_prefix": "/tiny",
        "import_path": "mlflow_pt_deploy.serving.ray:app",
        "args": {
            "model": "models:/tiny@champion",
            "num_replicas": 2,
            "ray_actor_options": {"num_cpus": 0.5},
            "poll_s": 0.2,
            "hang_s": 2,
            "max_batch_rows": 16,
        },
        "deployments": [{"name": NAME, "health_check_period_s": 1}],
    }
    config = {"http_options": {"host": "127.0.0.1", "port": port}, "applications": [application]}
    (folder / "serve.yaml").write_text(yaml.safe_dump(config))
    variables = {
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent), *sys.path]),
        "MLFLOW_TRACKING_URI": registry.uri,
        "MLFLOW_REGISTRY_URI": registry.uri,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": "/tmp",  # a socket's path is short
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    command = [sys.executable, "-m", "ray.serve.scripts", "run", str(folder / "serve.yaml")]
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(command, env=os.environ | variables, stdout=log, stderr=log) as process,
    ):
        try:
            address = f"http://127.0.0.1:{port}/tiny"
            until(lambda: process.poll() is not None or answers(address), START_S)
            assert process.poll() is None, (folder / "log").read_text()[-3000:]
            yield address
        finally:
            process.terminate()  # Ray's processes end with it
            process.wait(120)


def answers(address: str) -> bool:
    try:
        return requests.get(f"{address}/readyz", timeout=5).status_code == 200
    except requests.RequestException:
        return False


def ask(url: str, *texts: str) -> requests.Response:
    return requests.post(f"{url}/invocations", json={"inputs": list(texts)}, timeout=60)


@pytest.mark.slow
def test_replicas_answer_by_mlflows_protocol(url: str) -> None:
    answer = ask(url, "red", "blue")
    assert answer.headers["x-model-version"] == "1"
    assert [each["label"] for each in answer.json()["predictions"]] == ["red", "blue"]
    wrong = requests.post(
        f"{url}/invocations", data=b"{", headers={"content-type": "application/json"}, timeout=60
    )
    assert (wrong.status_code, wrong.json()["error_code"]) == (400, "INVALID_PARAMETER_VALUE")
    assert requests.get(f"{url}/nothing", timeout=60).status_code == 404
    model = requests.get(f"{url}/model", timeout=60).json()
    assert (model["model"], model["model_config"]["max_batch_rows"]) == ("tiny", 16)


@pytest.mark.slow
def test_an_alias_moves_under_load_and_no_request_fails(url: str, registry: Registry) -> None:
    ended = threading.Event()
    seen: list[tuple[int, str, str]] = []

    def load() -> None:
        with requests.Session() as session:
            while not ended.is_set():
                answer = session.post(f"{url}/invocations", json={"inputs": ["red"]}, timeout=60)
                (row,) = answer.json()["predictions"]
                seen.append((answer.status_code, answer.headers["x-model-version"], row["label"]))

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    try:
        registry.move("2")
        until(lambda: seen[-40:] and all(version == "2" for _, version, _ in seen[-40:]), 120)
    finally:
        ended.set()
        for thread in threads:
            thread.join()
        registry.move("1")
    assert {(200, "1", "red"), (200, "2", "rouge")} >= set(seen)
    assert (200, "1", "red") in seen


@pytest.mark.slow
def test_a_replica_that_hangs_is_replaced(url: str) -> None:
    def is_live() -> bool:
        return requests.get(f"{url}/livez", timeout=60).status_code == 200

    with pytest.raises(requests.Timeout):  # "slow" takes ten minutes
        requests.post(f"{url}/invocations", json={"inputs": ["slow"]}, timeout=1)
    until(lambda: not is_live(), 60)
    until(lambda: all(is_live() for _ in range(20)), START_S)
    assert ask(url, "red").status_code == 200
