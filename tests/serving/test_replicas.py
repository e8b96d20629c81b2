"""Several worker processes behind one port: they answer as one server and are restarted."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from mlflow import MlflowClient
from tiny.registry import new_registry, register_tiny
from tiny.server import START_S, Served, started, until
from tiny.serving import save_tiny

from mlflow_pt_deploy.plugins.deployment_client import PtDeployClient
from mlflow_pt_deploy.system.hardware import core_numbers

if not hasattr(socket, "SO_REUSEPORT"):
    pytest.skip("needs SO_REUSEPORT", allow_module_level=True)
URI = "models:/tiny@champion"
TWO = ("--replicas", "2", "--poll-s", "0.1")


@pytest.fixture(scope="module")
def registry(
    empty_database: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[MlflowClient, str]:
    folder = tmp_path_factory.mktemp("replicas")
    client, uri = new_registry(folder, empty_database)
    # a batch with the word "slow" never ends: on a thread, and on the event loop
    register_tiny(client, folder, *({"predict_s": s, "slow_s": 600} for s in (0.002, 0)))
    return client, uri


@pytest.fixture(scope="module")
def server(
    registry: tuple[MlflowClient, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    uris = dict.fromkeys(("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"), registry[1])
    scratch = tmp_path_factory.mktemp("server") / "scratch"
    with started(scratch, URI, *TWO, "--hang-s", "4", **uris) as served:
        yield served


@pytest.fixture(autouse=True)
def all_ready(request: pytest.FixtureRequest) -> None:
    """A worker that an earlier test ended is back."""
    if "server" in request.fixturenames:
        url = request.getfixturevalue("server").url
        until(lambda: is_ready(url) and both_run(url), START_S)


def ask(url: str, text: str = "red") -> requests.Response:
    """Score over a connection of its own."""
    return requests.post(f"{url}/invocations", json={"inputs": [text]}, timeout=60)


def retried(call: Callable[[str], requests.Response], url: str) -> requests.Response:
    """The response of a call, after a few tries if its connection is closed."""
    for _ in range(20):
        try:
            return call(url)
        except requests.ConnectionError:  # the kernel had given it to a process that was ending
            time.sleep(0.1)
    return call(url)


def model(url: str) -> dict[str, Any]:
    found: dict[str, Any] = retried(
        lambda url: requests.get(f"{url}/model", timeout=10), url
    ).json()
    return found


def replicas(url: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = model(url)["replicas"]
    return found


def pids(url: str) -> list[int]:
    return [each["pid"] for each in replicas(url)]


def is_ready(url: str) -> bool:
    try:
        return requests.get(f"{url}/readyz", timeout=10).status_code == 200
    except requests.ConnectionError:  # no process listens
        return False


def both_run(url: str) -> bool:
    """Whether no worker is missing; a new one is counted once it is ready."""
    return len(pids(url)) == 2


def counted(url: str) -> float:
    """Good responses of all workers, those that ended included."""
    text = retried(lambda url: requests.get(f"{url}/metrics", timeout=10), url).text
    lines = re.findall(r'^pt_deploy_requests_total\{.*status="200".*\} (\S+)$', text, re.M)
    return sum(map(float, lines))


def gauge(url: str, name: str) -> float:
    text = retried(lambda url: requests.get(f"{url}/metrics", timeout=10), url).text
    return float(re.findall(rf"^pt_deploy_{name} (\S+)$", text, re.M)[0])


def rows(url: str) -> float:
    """Rows of all workers, as each of them computes it."""
    text = retried(lambda url: requests.get(f"{url}/metrics", timeout=10), url).text
    return sum(map(float, re.findall(r"^pt_deploy_rows_total\{.*\} (\S+)$", text, re.M)))


def alive(pids: Sequence[int]) -> list[int]:
    """Those that still run; a zombie has ended."""
    found = []
    for pid in pids:
        state = subprocess.run(
            ["ps", "-o", "stat=", "-p", str(pid)], check=False, capture_output=True, text=True
        )
        if state.stdout.strip() and not state.stdout.startswith("Z"):
            found.append(pid)
    return found


def test_both_answer_and_metrics_add_them_up(server: Served) -> None:
    assert "2 replicas, each a process for " in server.banner
    assert re.search(r"/models/tiny: tiny-numpy-fp32, version \d, follows", server.banner)
    before, rows_before = counted(server.url), rows(server.url)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, [server.url] * 40))
    assert [answer.status_code for answer in answers] == [200] * 40
    prefixes = {answer.headers["x-request-id"].partition("-")[0] for answer in answers}
    assert len(prefixes) == 2, "each worker has its own"
    until(lambda: counted(server.url) == before + 40)
    until(lambda: rows(server.url) == rows_before + 40)
    until(lambda: gauge(server.url, "replica_up") == 2)
    found = replicas(server.url)
    assert [each["replica"] for each in found] == [0, 1]
    assert len({each["pid"] for each in found} | {server.process.pid}) == 3


def test_all_replicas_follow_the_alias(server: Served, registry: tuple[MlflowClient, str]) -> None:
    for version in ("2", "1"):
        registry[0].set_registered_model_alias("tiny", "champion", version)
        until(lambda now=version: {each["version"] for each in replicas(server.url)} == {now})
        assert {ask(server.url).headers["X-Model-Version"] for _ in range(8)} == {version}
        assert is_ready(server.url)


def test_a_killed_replica_is_restarted_and_the_other_goes_on(server: Served) -> None:
    victim = pids(server.url)[1]
    before = counted(server.url)
    os.kill(victim, signal.SIGKILL)
    scored = 0
    end = time.monotonic() + START_S
    while victim in pids(server.url) or not both_run(server.url):
        assert time.monotonic() < end
        assert retried(ask, server.url).status_code == 200
        scored += 1
        probe = retried(lambda url: requests.get(f"{url}/readyz", timeout=10), server.url)
        assert probe.status_code == 200, "the other one serves"
    assert counted(server.url) >= before + scored, "what the ended process counted stays"
    # granian numbers its workers by itself
    until(lambda: re.search(r"Unexpected exit from worker-[12]", server.log))


def test_all_killed_replicas_serve_again_what_was_served_before_a_rejection(
    server: Served, registry: tuple[MlflowClient, str], tmp_path: Path
) -> None:
    client = registry[0]
    client.set_registered_model_alias("tiny", "champion", "2")
    until(lambda: [each["version"] for each in replicas(server.url)] == ["2", "2"])
    unfit = client.create_model_version("tiny", str(save_tiny(tmp_path / "unfit", refuse="no")))
    client.set_registered_model_alias("tiny", "champion", unfit.version)
    try:
        until(lambda: all(model(server.url)["refused"] for _ in range(8)))
        victims = pids(server.url)
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        until(lambda: not alive(victims))
        until(lambda: is_ready(server.url) and both_run(server.url), START_S)
        assert ask(server.url).headers["X-Model-Version"] == "2"
        found = replicas(server.url)
        assert [each["version"] for each in found] == ["2", "2"]
        assert not {each["pid"] for each in found} & set(victims)
        until(lambda: all(model(server.url)["refused"] for _ in range(8)))
    finally:
        client.set_registered_model_alias("tiny", "champion", "1")
    until(lambda: [each["version"] for each in replicas(server.url)] == ["1", "1"])


@pytest.mark.parametrize("version", ["2", "1"], ids=["on the event loop", "on a thread"])
def test_a_replica_whose_model_hangs_is_ended_and_restarted(
    server: Served, registry: tuple[MlflowClient, str], version: str
) -> None:
    registry[0].set_registered_model_alias("tiny", "champion", version)
    until(lambda: [each["version"] for each in replicas(server.url)] == [version] * 2)
    before = pids(server.url)
    with pytest.raises(requests.ConnectionError):  # it ends with the process that held it
        ask(server.url, "slow")
    until(lambda: set(pids(server.url)) != set(before) and both_run(server.url), START_S)
    assert len(set(pids(server.url)) & set(before)) == 1, "the other one stays"
    assert "model tiny has been computing one batch for 4 s" in server.log


def test_a_stopped_replica_does_not_make_the_server_ready_or_lose_others(server: Served) -> None:
    """SIGSTOP stops the watchdog too: it goes on, and nothing is ended, when the process does."""
    before = pids(server.url)
    os.kill(before[1], signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(8) as pool:
            waiting = [pool.submit(ask, server.url) for _ in range(8)]
            until(lambda: any(each.done() for each in waiting))
            os.kill(before[1], signal.SIGCONT)
            assert {each.result().status_code for each in waiting} == {200}
    finally:
        os.kill(before[1], signal.SIGCONT)
    assert pids(server.url) == before


def test_on_sigterm_all_finish_their_requests(tmp_path: Path) -> None:
    slow = save_tiny(tmp_path / "tiny", predict_s=0.002, slow_s=1)
    pin = ["--pin"] if len(core_numbers()) > 1 else []
    scratch = tmp_path / "scratch"
    with started(scratch, str(slow), *TWO, *pin) as served, ThreadPoolExecutor(6) as pool:
        workers = pids(served.url)
        if pin:
            first, second = (os.sched_getaffinity(pid) for pid in workers)
            assert first and second and not first & second
        in_flight = [pool.submit(ask, served.url, f"slow {n}") for n in range(6)]
        until(lambda: gauge_sum(served.url, "in_flight") == 6)
        served.process.send_signal(signal.SIGTERM)
        assert [each.result().status_code for each in in_flight] == [200] * 6
        assert served.process.wait(START_S) == 0
        assert alive(workers) == []
        with pytest.raises(requests.ConnectionError):
            ask(served.url)
    assert list(scratch.iterdir()) == []


def gauge_sum(url: str, name: str) -> float:
    """A gauge of all workers; each samples it once a second."""
    text = requests.get(f"{url}/metrics", timeout=10).text
    return sum(map(float, re.findall(rf"^pt_deploy_{name}\{{.*\}} (\S+)$", text, re.M)))


def test_a_deployment_is_updated_in_all_replicas_and_none_outlives_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    client = PtDeployClient("pt-deploy")
    config = {"replicas": "2"}
    deployed = client.create_deployment("shop", str(save_tiny(tmp_path / "one")), config=config)
    try:
        workers = pids(deployed["url"])
        assert len(set(workers) | {deployed["pid"]}) == 3
        client.update_deployment("shop", str(save_tiny(tmp_path / "two")))
        until(lambda: {Path(model(deployed["url"])["uri"]).name for _ in range(8)} == {"two"})
        assert alive(workers) == workers
    finally:
        os.kill(deployed["pid"], signal.SIGKILL)
    until(lambda: not alive(workers))
