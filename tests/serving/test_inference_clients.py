"""Clients of the Open Inference Protocol that others wrote: tritonclient and the KServe SDK.

They demand older versions of our dependencies, so they live in an environment of their own:

    python3 -m venv CLIENTS && CLIENTS/bin/pip install 'tritonclient[http,grpc]' kserve
    PT_DEPLOY_CLIENTS=CLIENTS/bin/python pytest tests/serving/test_inference_clients.py
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from tiny import inference_clients
from tiny.server import Served, free_port, started
from tiny.serving import save_tiny

PYTHON = os.environ.get("PT_DEPLOY_CLIENTS", "")
pytestmark = pytest.mark.skipif(
    not PYTHON, reason="PT_DEPLOY_CLIENTS names no Python that has tritonclient and kserve"
)

Ask = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Ask]]:
    """A server, and a function that runs clients against it."""
    pytest.importorskip("grpc", reason="needs the extra `grpc`")
    folder, port = tmp_path_factory.mktemp("clients"), free_port()
    words = (str(save_tiny(folder / "tiny")), "--replicas", "1", "--grpc-port", str(port))
    with started(folder / "scratch", *words) as served:

        def run(client: str) -> dict[str, Any]:
            script = str(Path(inference_clients.__file__))
            command = [PYTHON, script, client, served.url, f"127.0.0.1:{port}"]
            environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
            done = subprocess.run(
                command, check=False, env=environment, capture_output=True, text=True, timeout=300
            )
            assert done.returncode == 0, done.stderr
            found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
            return found

        yield served, run


@pytest.mark.parametrize("client", ["triton", "kserve"])
def test_clients_get_the_predictions_of_invocations(ask: tuple[Served, Ask], client: str) -> None:
    served, run = ask
    texts = {"inputs": inference_clients.TEXTS}
    plain = requests.post(f"{served.url}/invocations", json=texts, timeout=30).json()
    expected = [[row["label"], row["score"]] for row in plain["predictions"]]
    for way, found in run(client).items():
        if way.endswith("probes"):
            assert found == [True, True, True], way
        elif way.endswith("error"):
            assert found == "there is no such model"
        elif way.endswith("metadata"):
            assert (found[0]["name"], found[0]["datatype"]) == ("text", "BYTES")
        else:
            assert found == expected, way
