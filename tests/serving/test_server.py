"""The server as a process or on raw sockets: TLS, limits on connections, its end."""

import datetime
import ipaddress
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import requests
from tiny.server import running
from tiny.serving import save_tiny

from mlflow_pt_deploy.registry.addresses import source
from mlflow_pt_deploy.serving import bounded
from mlflow_pt_deploy.serving.app import Application
from mlflow_pt_deploy.serving.lifecycle.served_model import ServedModel

connection = pytest.importorskip("mlflow_pt_deploy.serving.connection")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("server") / "tiny", predict_s=0.5)


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[tuple[str, int]]:
    slot = ServedModel("tiny", source(str(folder)))
    slot.open()
    with running(Application({"tiny": slot}), http=connection.Connection) as url:
        host, port = url.removeprefix("http://").split(":")
        yield host, int(port)


@contextmanager
def started(*words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """``pt-deploy serve`` as a process, and where it listens."""
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    with subprocess.Popen(
        [sys.executable, "-m", "mlflow_pt_deploy.cli", "serve", *words, "--port", "0"],
        env=os.environ | {"PYTHONPATH": path + os.pathsep + os.environ.get("PYTHONPATH", "")},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout
            line = process.stdout.readline()
            found = re.match(r"tiny-numpy-fp32 on (https?://127.0.0.1:\d+) ", line)
            assert found, line
            yield process, found[1]
        finally:
            process.kill()


def test_a_long_head_is_refused(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as client:
        client.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\nX-Big: ")
        with pytest.raises(OSError):  # it closes while we still send
            for _ in range(10_000):
                client.sendall(b"a" * 4096)
    with socket.create_connection(address) as client:
        client.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\nX-Big: " + b"a" * 70_000)
        assert b"400 Bad Request" in client.recv(4096)


def test_a_head_that_does_not_come_ends_the_connection(
    address: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded, "HEAD_S", 0.1)
    for head in (b"", b"GET /livez HTTP/1.1\r\nHo"):
        with socket.create_connection(address, timeout=5) as client:
            client.sendall(head)
            with suppress(ConnectionResetError):
                assert client.recv(100) == b""
    with socket.create_connection(address, timeout=5) as client:
        for _ in range(3):
            client.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
            assert client.recv(4096).startswith(b"HTTP/1.1 200")
            time.sleep(0.15)


def test_a_life_behind_tls(folder: Path, tmp_path: Path) -> None:
    cert, key = _certificate(tmp_path)
    other = save_tiny(tmp_path / "other", label="crimson")
    words = (str(folder), f"second={other}", "-C", "max_batch_rows=4", "--access-log")
    tls = ("--tls-cert", str(cert), "--tls-key", str(key))
    with started(*words, *tls) as (process, url), requests.Session() as session:
        assert url.startswith("https://")
        session.trust_env, session.verify = False, str(cert)
        with pytest.raises(requests.ConnectionError):
            requests.get(url.replace("https", "http"), timeout=5)
        _check_models_and_options_by_name(session, url)
        _check_that_it_ends_what_it_began_and_exits_with_0(process, session, url)
        assert process.stdout
        line = process.stdout.read()
    assert re.search(r"/models/tiny: tiny-numpy-fp32, version 0{12}; cpu, \d+ threads a call", line)
    assert re.search(r"^  (1|\d replicas, each a) process for \d+ core", line, re.M)
    assert "batches up to 4 rows and 2048 tokens, queue of 1024 rows, deadline 10000 ms" in line


def _check_models_and_options_by_name(session: requests.Session, url: str) -> None:
    label = {}
    for path in ("/invocations", "/models/tiny/invocations", "/models/second/invocations"):
        answer = session.post(url + path, json={"inputs": ["red"]}, timeout=10)
        label[path] = answer.json()["predictions"][0]["label"]
    assert list(label.values()) == ["red", "red", "crimson"]
    models = session.get(f"{url}/models", timeout=5).json()
    assert [model["model"] for model in models] == ["tiny", "second"]
    assert models[1]["model_config"] == {"max_batch_rows": 4}


def _check_that_it_ends_what_it_began_and_exits_with_0(
    process: subprocess.Popen[str], session: requests.Session, url: str
) -> None:
    with ThreadPoolExecutor(1) as pool:
        in_flight = pool.submit(
            session.post, f"{url}/invocations", json={"inputs": ["red"]}, timeout=10
        )
        time.sleep(0.25)
        process.send_signal(signal.SIGTERM)
        assert in_flight.result().status_code == 200
        assert process.wait(10) == 0


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
