"""A server whose workers share one copy of a model; the CPU stands in for a GPU."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from tiny.server import START_S, Served, started, until

from .conftest import VARIANT

if not hasattr(socket, "SO_REUSEPORT"):
    pytest.skip("needs SO_REUSEPORT", allow_module_level=True)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    scratch = tmp_path_factory.mktemp("server") / "scratch"
    words = (str(VARIANT.parent), "--replicas", "2", "--poll-s", "0.1")
    with started(scratch, *words, TINY_DEVICE_PROCESS="1") as served:
        yield served


def ask(url: str, text: str = "my card") -> requests.Response:
    """Score over a connection of its own, again if it reached a worker that was ending."""
    for _ in range(20):
        try:
            return requests.post(f"{url}/invocations", json={"inputs": [text]}, timeout=60)
        except requests.ConnectionError:
            continue
    raise AssertionError("no worker answers")


def replicas(url: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = requests.get(f"{url}/model", timeout=10).json()["replicas"]
    return found


def device_pids(url: str) -> set[int]:
    """Process ids of the device's process, as each replica says."""
    return {one["pid"] for each in replicas(url) for one in each["device_processes"]}


def is_ready(url: str) -> bool:
    return requests.get(f"{url}/readyz", timeout=10).status_code == 200


def test_all_workers_answer_with_one_copy_which_outlives_them(server: Served) -> None:
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda _: ask(server.url), range(40)))
    assert {answer.json()["predictions"][0]["label"] for answer in answers} == {"card"}
    (process,) = device_pids(server.url)
    first, second = (each["pid"] for each in replicas(server.url))
    assert len({process, first, second, server.process.pid}) == 4
    os.kill(first, signal.SIGKILL)
    until(lambda: ask(server.url).status_code == 200)
    until(lambda: {e["pid"] for e in replicas(server.url)} - {first, second}, START_S)
    assert device_pids(server.url) == {process}
    assert server.log.count("was loaded") == 1


def test_a_device_that_is_lost_is_a_503_until_the_model_is_loaded_again(server: Served) -> None:
    (process,) = device_pids(server.url)
    os.kill(process, signal.SIGKILL)
    refused: list[requests.Response] = []
    while is_ready(server.url) or not refused:
        refused += [answer for answer in (ask(server.url),) if answer.status_code != 200]
    assert {answer.status_code for answer in refused} == {503}
    assert "has ended" in refused[0].json()["message"]
    until(lambda: is_ready(server.url), START_S)
    until(lambda: ask(server.url).status_code == 200)
    until(lambda: process not in device_pids(server.url))
    assert len(device_pids(server.url)) == 1
    assert "Traceback" not in server.log


def test_the_device_process_ends_with_the_server(server: Served) -> None:
    (process,) = device_pids(server.url)
    server.process.kill()

    def is_gone() -> bool:
        status = Path(f"/proc/{process}/stat")
        return not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"

    until(is_gone)
