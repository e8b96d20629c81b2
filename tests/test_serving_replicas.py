"""Several processes behind one port: they answer as one server, and none is missed or left over."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import requests
from mlflow import MlflowClient
from tiny_serving import save_tiny, until

from mlflow_pt_deploy.errors import ServingError
from mlflow_pt_deploy.hardware import core_numbers, usable_cores
from mlflow_pt_deploy.plugins.deployment import PtDeployClient
from mlflow_pt_deploy.serving.port import hold_port, join_port
from mlflow_pt_deploy.serving.settings import Settings
from mlflow_pt_deploy.serving.shares import Share, count_replicas, describe_shares, share_cores

pytest.importorskip("mlflow_pt_deploy.serving.prometheus")
if not hasattr(socket, "SO_REUSEPORT"):
    pytest.skip("needs SO_REUSEPORT", allow_module_level=True)
URI = "models:/tiny@champion"
PATH = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
START_S = 60


class Served(NamedTuple):
    """A server of two replicas; `words` are the first it said."""

    process: subprocess.Popen[str]
    url: str
    words: str
    scratch: Path


@contextmanager
def started(scratch: Path, *words: str, **environment: str) -> Iterator[Served]:
    """``pt-deploy serve --replicas 2`` as a process that is ready."""
    scratch.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "mlflow_pt_deploy.cli", "serve", *words]
    environment |= {"PYTHONPATH": PATH, "TMPDIR": str(scratch), "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (
        (scratch / "log").open("w+") as log,
        subprocess.Popen(
            [*command, "--port", "0", "--poll-s", "0.1", "--replicas", "2"],
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as process,
    ):
        try:
            assert process.stdout
            told = [process.stdout.readline() for _ in range(3)]
            found = re.match(r"tiny-numpy-fp32 on (http://127.0.0.1:\d+) ", told[0])
            assert found, (scratch / "log").read_text()
            yield Served(process, found[1], "".join(told), scratch)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def registry(
    once: Callable[[str, Callable[[Path], object]], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[MlflowClient, str]:
    def write(path: Path) -> None:
        MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()

    folder = tmp_path_factory.mktemp("replicas")
    uri = f"sqlite:///{folder}/mlflow.db"
    (folder / "mlflow.db").write_bytes(once("mlflow.db", write).read_bytes())
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    client.create_registered_model("tiny")
    for number in (1, 2):
        source = save_tiny(folder / f"tiny-{number}")
        client.create_model_version("tiny", str(source))
    client.set_registered_model_alias("tiny", "champion", "1")
    return client, uri


@pytest.fixture(scope="module")
def server(
    registry: tuple[MlflowClient, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    uris = dict.fromkeys(("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"), registry[1])
    with started(tmp_path_factory.mktemp("server"), URI, **uris) as served:
        yield served


def ask(url: str, text: str = "red") -> requests.Response:
    """Score over a connection of its own."""
    return requests.post(f"{url}/invocations", json={"inputs": [text]}, timeout=20)


def patient(call: Callable[[str], requests.Response], url: str) -> requests.Response:
    """What a call answers at once, or at the second try."""
    try:
        return call(url)
    except requests.ConnectionError:  # the kernel had given it to a process that was ending
        time.sleep(0.3)
        return call(url)


def replicas(url: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = requests.get(f"{url}/model", timeout=10).json()["replicas"]
    return found


def ready(url: str) -> requests.Response:
    return requests.get(f"{url}/readyz", timeout=10)


def is_ready(url: str) -> bool:
    try:
        return ready(url).status_code == 200
    except requests.ConnectionError:  # there is nobody at the port
        return False


def counted(url: str) -> dict[str, float]:
    """Good answers by replica."""
    text = requests.get(f"{url}/metrics", timeout=10).text
    lines = re.findall(r'^pt_deploy_requests_total\{.*replica="(\d)".*\} (\S+)$', text, re.M)
    return {index: sum(float(n) for at, n in lines if at == index) for index in ("0", "1")}


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


def test_both_answer_and_every_request_is_counted_once(server: Served) -> None:
    assert "2 replicas, each a process for " in server.words
    assert re.search(r"/models/tiny: tiny-numpy-fp32, version \d, follows", server.words)
    before = counted(server.url)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, [server.url] * 40))
    assert [answer.status_code for answer in answers] == [200] * 40
    until(lambda: sum(counted(server.url).values()) - sum(before.values()) >= 40)
    after = counted(server.url)
    assert sum(after.values()) - sum(before.values()) == 40
    assert all(after[index] > before[index] for index in after)
    text = requests.get(f"{server.url}/metrics", timeout=10).text
    assert 'pt_deploy_replica_up{replica="1"} 1.0' in text
    told = replicas(server.url)
    assert [each["replica"] for each in told] == [0, 1]
    assert len({each["pid"] for each in told} | {server.process.pid}) == 3


def test_whoever_is_asked_for_models_tells_of_all(server: Served) -> None:
    for _ in range(8):
        (model,) = requests.get(f"{server.url}/models", timeout=10).json()
        assert [each["answers"] for each in model["replicas"]] == [True, True]
        assert model["version"] == model["replicas"][model["replica"]]["version"]


def test_all_replicas_follow_the_alias(server: Served, registry: tuple[MlflowClient, str]) -> None:
    for version in ("2", "1"):
        registry[0].set_registered_model_alias("tiny", "champion", version)
        until(lambda now=version: {each["version"] for each in replicas(server.url)} == {now}, 20)
        assert {ask(server.url).headers["X-Model-Version"] for _ in range(8)} == {version}
        assert ready(server.url).status_code == 200


def test_one_that_is_killed_comes_back_and_the_other_goes_on(server: Served) -> None:
    victim = replicas(server.url)[1]["pid"]
    os.kill(victim, signal.SIGKILL)
    unready: list[dict[str, Any]] = []  # a response kept would keep its connection open
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        assert patient(ask, server.url).status_code == 200
        probe = patient(ready, server.url)
        if probe.status_code == 200 and unready:
            break
        if probe.status_code == 503:
            unready.append(probe.json())
    assert len(unready) > 1
    assert unready[-1] == {"status": "loading", "replicas": [1]}
    told = replicas(server.url)
    assert [each["answers"] for each in told] == [True, True]
    assert told[1]["pid"] != victim
    log = (server.scratch / "log").read_text()
    assert "replica 1 was killed (SIGKILL)" in log and "started again in 1 s" in log
    until(lambda: "replica 1 is back after" in (server.scratch / "log").read_text())


def test_all_that_are_killed_come_back_with_what_served_before_a_refusal(
    server: Served, registry: tuple[MlflowClient, str], tmp_path: Path
) -> None:
    client = registry[0]
    client.set_registered_model_alias("tiny", "champion", "2")
    until(lambda: [each["version"] for each in replicas(server.url)] == ["2", "2"], 20)
    time.sleep(2.5)  # the parent has heard of it
    unfit = client.create_model_version("tiny", str(save_tiny(tmp_path / "unfit", refuse="no")))
    client.set_registered_model_alias("tiny", "champion", unfit.version)
    try:
        until(lambda: all(each["refused"] for each in replicas(server.url)), 20)
        victims = [each["pid"] for each in replicas(server.url)]
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        until(lambda: not alive(victims))
        until(lambda: is_ready(server.url), START_S)
        assert ask(server.url).headers["X-Model-Version"] == "2"
        until(lambda: all(each["refused"] for each in replicas(server.url)), 20)
        told = replicas(server.url)
        assert [each["version"] for each in told] == ["2", "2"]
        assert [each["refused"]["version"] for each in told] == [str(unfit.version)] * 2
        assert not {each["pid"] for each in told} & set(victims)
    finally:
        client.set_registered_model_alias("tiny", "champion", "1")


def test_one_that_stands_still_is_killed_and_comes_back(tmp_path: Path) -> None:
    slow = save_tiny(tmp_path / "tiny", load_s=6)  # longer than the limit: that is no standstill
    with (
        started(tmp_path / "scratch", str(slow), "--hang-s", "5") as served,
        ThreadPoolExecutor(8) as pool,
    ):
        before = [each["pid"] for each in replicas(served.url)]
        assert len(set(before)) == 2
        os.kill(before[1], signal.SIGSTOP)
        stopped = time.monotonic()
        waiting = [pool.submit(ask, served.url) for _ in range(8)]
        until(lambda: not alive(before[1:]), START_S)
        assert time.monotonic() - stopped > 4  # it was given its time
        for each in waiting:  # those of the other are answered, its own end with it
            error = each.exception()
            assert error is None or type(error) is requests.ConnectionError
        log = served.scratch / "log"
        until(lambda: "replica 1 is back after" in log.read_text(), START_S)
        told = "replica 1 gave no sign of life for 5 s and was killed; started again in 1 s"
        assert told in log.read_text()
        assert ready(served.url).status_code == 200
        after = [each["pid"] for each in replicas(served.url)]
        assert after[0] == before[0] and after[1] != before[1]


def test_one_whose_model_hangs_is_killed_and_comes_back(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny", predict_s=0.005, hang_s=600)
    with started(tmp_path / "scratch", str(folder), "--hang-s", "2") as served:
        before = [each["pid"] for each in replicas(served.url)]
        with pytest.raises(requests.ConnectionError):  # its end is its replica's
            ask(served.url, "explode")
        until(lambda: is_ready(served.url), START_S)
        after = [each["pid"] for each in replicas(served.url)]
        assert len(set(before) & set(after)) == 1
        told = "was killed: its model computed one batch for 2 s; started again in 1 s"
        assert told in (served.scratch / "log").read_text()


def test_told_to_stop_all_end_what_they_began(tmp_path: Path) -> None:
    slow = save_tiny(tmp_path / "tiny", predict_s=0.5)
    pin = ["--pin"] if len(core_numbers()) > 1 else []
    with (
        started(tmp_path / "scratch", str(slow), *pin) as served,
        ThreadPoolExecutor(6) as pool,
    ):
        pids = [each["pid"] for each in replicas(served.url)]
        if pin:
            first, second = (os.sched_getaffinity(pid) for pid in pids)
            assert first and second and not first & second
        in_flight = [pool.submit(ask, served.url) for _ in range(6)]
        time.sleep(0.3)
        served.process.send_signal(signal.SIGTERM)
        assert [each.result().status_code for each in in_flight] == [200] * 6
        assert served.process.wait(20) == 0
        assert alive(pids) == []
        with pytest.raises(requests.ConnectionError):
            ask(served.url)
    assert [path.name for path in (tmp_path / "scratch").iterdir()] == ["log"]


def test_a_deployment_is_updated_in_all_and_no_replica_outlives_its_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    client = PtDeployClient("pt-deploy")
    told = client.create_deployment(
        "shop", str(save_tiny(tmp_path / "one")), config={"replicas": "2"}
    )
    try:
        pids = [each["pid"] for each in replicas(told["url"])]
        assert len(set(pids) | {told["pid"]}) == 3
        client.update_deployment("shop", str(save_tiny(tmp_path / "two")))
        assert [Path(each["uri"]).name for each in replicas(told["url"])] == ["two", "two"]
        assert alive(pids) == pids
    finally:
        os.kill(told["pid"], signal.SIGKILL)
    until(lambda: not alive(pids), 20)
    assert not list(tmp_path.glob("pt-deploy-*/*.sock"))


def test_a_model_that_may_not_serve_ends_it_all(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny", refuse="this one is damaged")
    with (
        pytest.raises(AssertionError, match="pt-deploy serve: this one is damaged"),
        started(tmp_path / "scratch", str(folder)),
    ):
        pass
    assert not list((tmp_path / "scratch").glob("pt-deploy-*"))


def test_few_cores_have_one_process_and_many_have_more() -> None:
    assert [count_replicas(0, cores) for cores in (1, 2, 4, 7, 8, 16, 32, 128)] == [
        *(1, 1, 1, 1),
        *(2, 4, 8, 8),
    ]
    assert count_replicas(0, 64, fit=False) == 1
    assert count_replicas(3, 1) == 3


def test_cores_are_shared_out_whole() -> None:
    assert share_cores(2, 8, range(8), False) == [Share(4), Share(4)]
    assert share_cores(2, 5, range(5), True) == [Share(2, (0, 1)), Share(3, (2, 3, 4))]
    assert share_cores(3, 2, (0, 1), False) == [Share(1), Share(1), Share(1)]
    quota = share_cores(2, 4, range(8), True)  # a container that sees more than it may use
    assert quota == [Share(2, (0, 1, 2, 3)), Share(2, (4, 5, 6, 7))]
    told = describe_shares(share_cores(2, 5, range(5), True))
    assert told == "2 replicas, each a process for 2 or 3 cores, pinned to 0,1 | 2,3,4"
    assert describe_shares([Share(2)]) == "1 process for 2 cores"
    with pytest.raises(ServingError, match="pin: 3 replicas cannot have a core each of 2"):
        share_cores(3, 2, (0, 1), True)
    with pytest.raises(ServingError, match="replicas is -1"):
        Settings(replicas=-1)
    with pytest.raises(ServingError, match="hang_s is -1; give seconds from 0"):
        Settings(hang_s=-1)


def test_a_share_is_what_libraries_take_for_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PT_DEPLOY_CORES", "1")
    assert usable_cores() == 1
    monkeypatch.setenv("PT_DEPLOY_CORES", "100000")
    most = usable_cores()
    monkeypatch.delenv("PT_DEPLOY_CORES")
    assert usable_cores() == most


@pytest.mark.skipif(not core_numbers(), reason="this system has no affinity")
def test_hyperthreads_of_a_core_stay_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    for number in range(4):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{number}/topology"
        folder.mkdir(parents=True)
        (folder / "physical_package_id").write_text("0\n")
        (folder / "core_id").write_text(f"{number % 2}\n")
    assert core_numbers(tmp_path) == [0, 2, 1, 3]
    assert core_numbers(tmp_path / "nothing there") == [0, 1, 2, 3]


def test_a_port_that_is_taken_is_refused() -> None:
    (held,) = hold_port("127.0.0.1", 0)
    port = held.getsockname()[1]
    (joined,) = join_port("127.0.0.1", port)
    with held, joined:
        joined.listen()
        with pytest.raises(ServingError, match=f"127.0.0.1, port {port}: .*another --port"):
            hold_port("127.0.0.1", port)
