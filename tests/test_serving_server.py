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
from mlflow.exceptions import MlflowException
from tiny_serving import running, save_tiny

from mlflow_pt_deploy.errors import ServingError
from mlflow_pt_deploy.serving import bounded
from mlflow_pt_deploy.serving.app import App
from mlflow_pt_deploy.serving.registry import in_words, source
from mlflow_pt_deploy.serving.settings import Settings
from mlflow_pt_deploy.serving.slot import Slot

connection = pytest.importorskip("mlflow_pt_deploy.serving.connection")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("server") / "tiny", predict_s=0.5)


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[tuple[str, int]]:
    slot = Slot("tiny", source(str(folder)))
    slot.open()
    with running(App({"tiny": slot}), http=connection.Connection) as url:
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
        (["--port", "99999"], "port is 99999; give 1 to 65535, or 0 for any free one"),
        (["--port", "-1", "--replicas", "2"], "port is -1; give 1 to 65535"),
        (["--host", "no.such.host.invalid", "--insecure"], "no.such.host.invalid cannot be found"),
        (["--host", "a..b", "--insecure"], "'a..b' is no host"),
        (["--replicas", "-1"], "replicas is -1; give how many (at most 256), or 0"),
        (["--replicas", "9999"], "replicas is 9999"),
        (["--poll-s", "-1"], "poll_s is -1; give seconds from 0"),
        (["--hang-s", "inf"], "hang_s is inf; give seconds from 0"),
        (["--max-body-mb", "-1"], "max_body_mb is -1; give more than 0"),
        (["--max-body-mb", "nan"], "max_body_mb is nan; give more than 0"),
        (["--max-connections", "0"], "max_connections is 0; give 1 or more"),
        (["--tls-cert", "no.pem", "--tls-key", "no.pem"], "no.pem is no file; give a PEM file"),
        (["--tls-cert", __file__, "--tls-key", __file__], "are not a PEM certificate and its key"),
    ],
)
def test_a_mistake_is_one_clear_line(
    folder: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow_pt_deploy.cli import main

    assert main(["serve", str(folder), *words]) == 1
    assert message in capsys.readouterr().err


def test_a_port_in_use(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mlflow_pt_deploy.cli import main

    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert main(["serve", str(folder), "--port", port]) == 1
    assert f"127.0.0.1, port {port}: Address already in use" in capsys.readouterr().err


def test_a_key_of_another_certificate(tmp_path: Path) -> None:
    cert, _ = _certificate(tmp_path)
    (tmp_path / "other").mkdir()
    _, key = _certificate(tmp_path / "other")
    with pytest.raises(ServingError, match="key.pem is not the key of the certificate"):
        Settings(tls_cert=str(cert), tls_key=str(key))


def test_a_folder_that_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mlflow_pt_deploy.cli import main

    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").touch()
    for word, message in (
        (f"{tmp_path}/none", f"the model {tmp_path}/none is not there. Give a folder that MLflow"),
        (f"shop={tmp_path}", "is no MLflow model: it has no file MLmodel. Give a folder"),
        (__file__, "is not a folder. Give a folder"),
        (f"{tmp_path}/hub", "with pt-deploy optimize --model"),
    ):
        assert main(["serve", word]) == 1
        assert message in capsys.readouterr().err


def test_what_the_registry_does_not_know(tracking: str, capsys: pytest.CaptureFixture[str]) -> None:
    from mlflow import MlflowClient

    from mlflow_pt_deploy.cli import main

    MlflowClient().create_registered_model("shop")
    for uri, reason in (
        ("models:/none@champion", "Registered Model with name=none not found. Look at its addr"),
        ("models:/shop@champion", "Registered model alias champion not found. Look at its addr"),
        ("models:/shop/9", "Model Version (name=shop, version=9) not found. Look"),
        ("file:///no/such", "there is no /no/such. Look"),
    ):
        assert main(["serve", uri, "--port", "0"]) == 1
        said = capsys.readouterr().err
        assert "pt-deploy serve: the model cannot be fetched or opened: " in said
        assert reason in said and "Traceback" not in said


def test_the_whole_reason_is_told_on_one_line() -> None:
    error = MlflowException("These failed:\n\n  ## a ##\nno such file\nTraceback (most")
    assert "opened: These failed: a no such file. Look at" in str(in_words(error))
    assert "opened: KeyError. Look" in str(in_words(KeyError()))


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
