"""``pt-deploy serve`` as a process: TLS, start, shutdown, and what it leaves behind."""

import datetime
import ipaddress
import re
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from tiny.server import START_S, Client, Served, started, until
from tiny.serving import save_tiny

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
    cert, key = _certificate(tmp_path)
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


def test_a_second_signal_ends_the_drain(folder: Path, tmp_path: Path) -> None:
    with started(tmp_path / "scratch", str(folder), *ONE, "--drain-s", "600") as served:
        served.process.send_signal(signal.SIGTERM)
        until(lambda: requests.get(f"{served.url}/readyz", timeout=10).status_code == 503)
        assert ends(served, signal.SIGINT) == 0


def test_open_connections_do_not_keep_the_server(folder: Path, tmp_path: Path) -> None:
    whole = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
    with (
        started(tmp_path / "scratch", str(folder), *ONE, "--grace-s", "1") as served,
        Client(served.url) as idle,
        Client(served.url) as half,
        Client(served.url) as silent,
    ):
        assert idle.ask(whole).status == 200
        half.send(whole[:20])
        assert ends(served) == 0
        for client in (idle, half, silent):
            assert client.is_closed()


def test_a_killed_server_leaves_no_process_and_the_next_removes_its_files(
    folder: Path, tmp_path: Path
) -> None:
    scratch = tmp_path / "scratch"
    with started(scratch, str(folder), *ONE) as served:
        pid = requests.get(f"{served.url}/model", timeout=10).json()["replicas"][0]["pid"]
        served.process.kill()
    until(lambda: not Path(f"/proc/{pid}").exists())
    (left,) = runs(scratch)
    with started(scratch, str(folder), *ONE) as served:
        (run,) = runs(scratch)
        assert run != left
        assert ends(served) == 0
    assert list(scratch.iterdir()) == []


def runs(scratch: Path) -> list[Path]:
    """The run directories there."""
    return list(scratch.glob("pt-deploy-run-*"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: save_tiny(path, refuse="this one is damaged"), "this one is damaged"),
        (lambda path: path / "nowhere", "the model cannot be fetched or opened: .*tiny"),
    ],
    ids=["rejected", "missing"],
)
def test_a_first_model_that_cannot_serve_ends_the_server(
    tmp_path: Path, make: Callable[[Path], Path], message: str
) -> None:
    model = make(tmp_path / "tiny")
    with (
        pytest.raises(AssertionError, match=f"pt-deploy serve: {message}") as info,
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
        (["-C", "num_threads"], "num_threads is no option; write it as KEY=VALUE"),
        (["--tls-cert", "cert.pem"], "belong together"),
    ],
)
def test_a_mistake_is_one_clear_line(
    folder: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow_pt_deploy.cli import main

    assert main(["serve", str(folder), *words]) == 1
    assert message in capsys.readouterr().err


def _certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that it signed itself."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(names, critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (folder / "cert.pem").write_bytes(certificate.public_bytes(pem))
    plain, none = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "key.pem").write_bytes(key.private_bytes(pem, plain, none))
    return folder / "cert.pem", folder / "key.pem"
