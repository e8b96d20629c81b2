"""A canary in two worker processes: its share, its end within 30 s, and no failed request."""

from __future__ import annotations

import math
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import requests
from mlflow import MlflowClient
from tiny.registry import new_registry, register_tiny
from tiny.server import Client, Served, free_port, request, started, until

from mlflow_pt_deploy.registry.canary import CANARY_ENDED_TAG, CANARY_TAG

if not hasattr(socket, "SO_REUSEPORT"):
    pytest.skip("needs SO_REUSEPORT", allow_module_level=True)
HABITS: tuple[dict[str, Any], ...] = (
    {},
    {},
    {"fails_on": "green"},
    {"wrong": True},
    {"predict_s": 0.1},
)
WORDS = ("red", "green", "blue")
REQUESTS, CLIENTS = 1500, 6


@pytest.fixture(scope="module")
def registry(
    empty_database: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[MlflowClient, str]:
    folder = tmp_path_factory.mktemp("canary")
    client, uri = new_registry(folder, empty_database)
    register_tiny(client, folder, *HABITS)
    client.set_registered_model_alias("tiny", "challenger", "2")
    return client, uri


@pytest.fixture(scope="module")
def server(
    registry: tuple[MlflowClient, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    uris = dict.fromkeys(("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"), registry[1])
    scratch = tmp_path_factory.mktemp("server") / "scratch"
    words = ["models:/tiny@champion", "--canary", "models:/tiny@challenger=5%"]
    if find_spec("grpc"):
        words += ["--grpc-port", str(free_port())]
    with started(scratch, *words, "--replicas", "2", "--poll-s", "0.2", **uris) as served:
        yield served


def states(url: str) -> list[tuple[str, str | None]]:
    """State and version of the canary in each worker."""
    replicas = requests.get(f"{url}/model", timeout=10).json()["replicas"]
    found = [each["canary"] or {"state": "off", "version": None} for each in replicas]
    return [(each["state"], each["version"]) for each in found]


@contextmanager
def clients(url: str) -> Iterator[Counter[str]]:
    """Six connections that score until the block ends; counts answers by version."""
    stop, versions, failed = threading.Event(), Counter[str](), list[str]()

    def run(number: int) -> None:
        with Client(url) as client:
            while not stop.is_set():
                number += 1
                answer = client.ask(request({"inputs": [WORDS[number % 3]]}))
                versions[answer.headers.get("x-model-version", "")] += 1
                if answer.status != 200:
                    failed.append(f"{answer.status} {answer.body!r}")

    threads = [threading.Thread(target=run, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        yield versions
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
    assert not failed, failed[:3]


def test_the_share_of_the_option_and_of_the_tag(
    server: Served, registry: tuple[MlflowClient, str]
) -> None:
    until(lambda: states(server.url) == [("running", "2")] * 2)
    for share, tag in ((0.05, ""), (0.2, "challenger:20%")):
        if tag:
            registry[0].set_registered_model_tag("tiny", CANARY_TAG, tag)
            until(lambda share=share: shares(server.url) == [share] * 2)  # type: ignore[misc]
        with clients(server.url) as versions:
            until(lambda versions=versions: versions.total() >= REQUESTS, 60)  # type: ignore[misc]
        expected = share * versions.total()
        assert set(versions) == {"1", "2"}
        assert abs(versions["2"] - expected) < 4 * math.sqrt(expected * (1 - share))


def test_a_key_has_one_version_in_both_workers_also_over_grpc(server: Served) -> None:
    for key in ("ann", "bob", "eve"):
        found = {
            requests.post(
                f"{server.url}/invocations",
                json={"inputs": ["red"]},
                headers={"x-pt-deploy-key": key},
                timeout=10,
            ).headers["x-model-version"]
            for _ in range(8)
        }
        assert len(found) == 1
        if find_spec("grpc"):
            port = re.search(r"gRPC on .*:(\d+)", server.log + server.banner)
            assert port
            assert {over_grpc(f"127.0.0.1:{port[1]}", key)} == found


def over_grpc(address: str, key: str) -> str:
    """The version that answers a key."""
    import grpc

    from mlflow_pt_deploy.serving.http import open_inference_pb2 as messages

    asked = messages.ModelInferRequest(model_name="tiny")
    tensor = asked.inputs.add(name="text", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(b"red")
    with grpc.insecure_channel(address) as channel:
        infer = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=messages.ModelInferRequest.SerializeToString,
            response_deserializer=messages.ModelInferResponse.FromString,
        )
        version: str = infer(asked, metadata=[("x-pt-deploy-key", key)], timeout=10).model_version
    return version


def shares(url: str) -> list[float]:
    replicas = requests.get(f"{url}/model", timeout=10).json()["replicas"]
    return [(each["canary"] or {}).get("share") for each in replicas]


@pytest.mark.parametrize(
    ("version", "reason"),
    [("3", "errors: "), ("4", "disagreement: "), ("5", "latency: p99 ")],
    ids=["raises", "answers wrongly", "is slow"],
)
def test_a_bad_canary_is_ended_in_both_workers(
    server: Served, registry: tuple[MlflowClient, str], version: str, reason: str
) -> None:
    client = registry[0]
    with clients(server.url) as versions:
        client.set_registered_model_tag("tiny", CANARY_TAG, f"version:{version}:20%")
        until(lambda: ("running", version) in states(server.url))
        start = time.monotonic()
        until(lambda: states(server.url) == [("ended", version)] * 2)
        assert time.monotonic() - start < 30
        before, enough = versions[version], versions.total() + 100
        until(lambda: versions.total() > enough)
        assert versions[version] <= before + CLIENTS, "those that were in flight"
    found = requests.get(f"{server.url}/model", timeout=10).json()["canary"]
    assert found["reason"].startswith(reason)
    assert found["counts"]["canary"]["requests"]
    until(lambda: CANARY_ENDED_TAG in client.get_model_version("tiny", version).tags)


def test_a_person_ends_it(server: Served, registry: tuple[MlflowClient, str]) -> None:
    client = registry[0]
    client.set_registered_model_tag("tiny", CANARY_TAG, "2:100%")
    until(lambda: states(server.url) == [("running", "2")] * 2)
    client.set_registered_model_tag("tiny", CANARY_TAG, "off")
    until(lambda: states(server.url) == [("off", None)] * 2)
    with clients(server.url) as versions:
        until(lambda: versions.total() > 100)
    assert set(versions) == {"1"}


def test_the_log_says_what_happened_once(server: Served) -> None:
    lines = server.log.splitlines()
    assert sum("canary running: version 2 answers 0.05" in line for line in lines) == 2
    assert sum("canary ended: errors: " in line for line in lines) == 2
