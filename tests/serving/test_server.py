"""``pt-deploy serve`` as a process: TLS, start, shutdown, and what it leaves behind."""

import re
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from tiny.certificates import new_certificate
from tiny.server import START_S, Client, Served, request, started, until
from tiny.serving import save_tiny

from mlflow_pt_deploy.cli import main

ONE = ("--replicas", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("server") / "tiny", predict_s=0.002, slow_s=1)


def score(url: str, text: str = "red", **options: object) -> requests.Response:
    body = {"inputs": [text]}
    return requests.post(f"{url}/invocations", json=body, timeout=30, **options)  # type: ignore[arg-type]


def ends(served: Served, number: signal.Signals = signal.SIGTERM) -> int:
    """The exit status after a signal."""
    served.process.send_signal(number)
    return served.process.wait(START_S)


def in_flight(url: str) -> bool:
    """Whether a request is being answered."""
    text = requests.get(f"{url}/metrics", timeout=10).text
    return any(float(n) for n in re.findall(r"^pt_deploy_in_flight\{.*\} (\S+)$", text, re.M))


def test_a_life_behind_tls(folder: Path, tmp_path: Path) -> None:
    cert, key = new_certificate(tmp_path)
    other = save_tiny(tmp_path / "other", label="crimson")
    words = (str(folder), f"second={other}", "-C", "max_batch_rows=4", *ONE)
    tls = ("--tls-cert", str(cert), "--tls-key", str(key))
    scratch = tmp_path / "scratch"
    with started(scratch, *words, *tls, models=2) as served, requests.Session() as session:
        url = served.url
        assert url.startswith("https://")
        session.trust_env, session.verify = False, str(cert)
        with pytest.raises(requests.ConnectionError):
            requests.get(url.replace("https", "http"), timeout=5)
        labels = {}
        for path in ("/invocations", "/models/tiny/invocations", "/models/second/invocations"):
            answer = session.post(url + path, json={"inputs": ["red"]}, timeout=10)
            labels[path] = answer.json()["predictions"][0]["label"]
        assert list(labels.values()) == ["red", "red", "crimson"]
        models = session.get(f"{url}/models", timeout=5).json()
        assert [model["model"] for model in models] == ["tiny", "second"]
        assert models[1]["model_config"] == {"max_batch_rows": 4}
        assert ends(served) == 0
    assert served.log, "the tiny model was exported with another Python, so there is a warning"
    for line in served.log.splitlines():
        assert re.match(r"\d{4}-\d\d-\d\dT[\d:.]{12}\+00:00 (INFO|WARNING|ERROR) ", line), line
    line = served.banner
    assert re.search(r"/models/tiny: tiny-numpy-fp32, version 0{12}; cpu, \d+ threads a call", line)
    assert re.search(r"^  1 process for \d+ core", line, re.M)
    assert "batches up to 4 rows and 2048 tokens, queue of 1024 rows, deadline 10000 ms" in line
    assert list(scratch.iterdir()) == []


def test_sigterm_drains_first_and_finishes_requests(folder: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    words = (str(folder), *ONE, "--drain-s", "2")
    with started(scratch, *words) as served, ThreadPoolExecutor(1) as pool:
        assert requests.get(f"{served.url}/readyz", timeout=10).status_code == 200
        served.process.send_signal(signal.SIGTERM)

        def draining() -> bool:
            return requests.get(f"{served.url}/readyz", timeout=10).json() == {"status": "draining"}

        until(draining)
        assert score(served.url).status_code == 200, "the port is still open"
        assert requests.get(f"{served.url}/livez", timeout=10).status_code == 200
        last = pool.submit(score, served.url, "slow")
        assert served.process.wait(START_S) == 0
        assert last.result().status_code == 200
    assert list(scratch.iterdir()) == []


def test_a_second_signal_ends_the_drain_at_once(folder: Path, tmp_path: Path) -> None:
    words = (str(folder), *ONE, "--drain-s", "600", "--grace-s", "600")
    with started(tmp_path / "scratch", *words) as served, Client(served.url) as half:
        half.send(request({"inputs": ["red"]})[:-3])
        served.process.send_signal(signal.SIGTERM)
        until(lambda: requests.get(f"{served.url}/readyz", timeout=10).status_code == 503)
        assert ends(served, signal.SIGINT) == 0
        assert half.is_closed()
        assert "Unexpected exit" not in served.log
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_second_signal_ends_requests_in_flight(folder: Path, tmp_path: Path) -> None:
    words = (str(folder), *ONE, "--grace-s", "600")
    with started(tmp_path / "scratch", *words) as served, Client(served.url) as half:
        half.send(request({"inputs": ["red"]})[:-3])
        until(lambda: in_flight(served.url))
        served.process.send_signal(signal.SIGTERM)
        until(lambda: refused(served.url))
        assert served.process.poll() is None, "the request is in flight"
        assert ends(served) == 0


def refused(url: str) -> bool:
    """Whether the port is closed."""
    try:
        requests.get(f"{url}/livez", timeout=10)
    except requests.ConnectionError:
        return True
    return False


def test_connections_without_a_request_do_not_delay_the_end(folder: Path, tmp_path: Path) -> None:
    whole = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
    with (
        started(tmp_path / "scratch", str(folder), *ONE, "--grace-s", "600") as served,
        Client(served.url) as idle,
        Client(served.url) as half,
        Client(served.url) as silent,
    ):
        assert idle.ask(whole).status == 200
        half.send(whole[:20])
        assert ends(served) == 0
        for client in (idle, half, silent):
            assert client.is_closed()
    assert list((tmp_path / "scratch").iterdir()) == []


def test_after_a_kill_the_next_server_takes_the_port_and_removes_the_files(
    folder: Path, tmp_path: Path
) -> None:
    scratch = tmp_path / "scratch"
    with started(scratch, str(folder), *ONE) as served, Client(served.url) as half:
        pid = requests.get(f"{served.url}/model", timeout=10).json()["replicas"][0]["pid"]
        half.send(request({"inputs": ["red"]})[:-3])  # not even a request keeps the worker
        until(lambda: in_flight(served.url))
        served.process.kill()
        served.process.wait()
        until(lambda: not Path(f"/proc/{pid}").exists())
        assert refused(served.url)
        (left,) = runs(scratch)
        port = served.url.rpartition(":")[2]
        with started(scratch, str(folder), *ONE, "--port", port) as again:
            assert again.url == served.url
            (run,) = runs(scratch)
            assert run != left
            assert score(again.url).status_code == 200
            assert ends(again) == 0
    assert list(scratch.iterdir()) == []


def runs(scratch: Path) -> list[Path]:
    """The run directories there."""
    return list(scratch.glob("pt-deploy-run-*"))


def test_a_first_model_that_cannot_serve_ends_the_server(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "tiny", refuse="this one is damaged")
    with (
        pytest.raises(AssertionError, match="pt-deploy serve: this one is damaged") as info,
        started(tmp_path / "scratch", str(model), *ONE),
    ):
        pass
    assert "Traceback" not in str(info.value)
    assert list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--host", "0.0.0.0"], "0.0.0.0 can be reached from other machines"),
        (["-C", "threads=2"], "model_config has no threads"),
        (["-C", "num_threads"], "num_threads is not an option; write it as KEY=VALUE"),
        (["--tls-cert", "cert.pem"], "belong together"),
        (["--port", "99999"], "port is 99999; give 1 to 65535, or 0 for any free one"),
        (["--port", "-1", "--replicas", "2"], "port is -1; give 1 to 65535"),
        (["--host", "no.such.host.invalid", "--insecure"], "no.such.host.invalid cannot be found"),
        (["--host", "a..b", "--insecure"], "'a..b' is no host"),
    ],
)
def test_an_invalid_option_is_one_clear_line(
    folder: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(folder), *words]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_port_in_use_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert main(["serve", str(folder), "--port", port]) == 1
    assert f"127.0.0.1, port {port}: Address already in use" in capsys.readouterr().err


def test_a_model_unknown_to_the_registry_ends_the_server(tracking: str, tmp_path: Path) -> None:
    message = "pt-deploy serve: .*opened: Registered Model with name=none not found. Check"
    with (
        pytest.raises(AssertionError, match=message) as info,
        started(tmp_path / "scratch", "models:/none@champion", *ONE, MLFLOW_TRACKING_URI=tracking),
    ):
        pass
    assert "Traceback" not in str(info.value)
