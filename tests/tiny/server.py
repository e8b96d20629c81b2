"""Servers and clients of the serving tests: uvicorn in a thread, `pt-deploy serve`, raw sockets."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from mlflow_pt_deploy.serving.app import Application
from mlflow_pt_deploy.serving.asgi import AsgiAdapter

JSON_HEAD = b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
START_S = 120
"""Long, because the machine may be busy."""

_TESTS = Path(__file__).resolve().parents[1]


@contextmanager
def running(app: Any, **settings: Any) -> Iterator[str]:
    """Run an `Application`, or an ASGI application, in a thread on a free port; yields its URL."""
    import uvicorn

    adapter = AsgiAdapter(app) if isinstance(app, Application) else app
    server = uvicorn.Server(uvicorn.Config(adapter, port=0, log_level="error", **settings))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)


class Served(NamedTuple):
    """``pt-deploy serve`` as a process.

    Attributes:
        process: The main process.
        url: Where it listens.
        banner: Its startup banner.
        scratch: Its temporary folder.
        log_path: What it wrote to standard error.
    """

    process: subprocess.Popen[str]
    url: str
    banner: str
    scratch: Path
    log_path: Path

    @property
    def log(self) -> str:
        return self.log_path.read_text()


@contextmanager
def started(scratch: Path, *words: str, models: int = 1, **environment: str) -> Iterator[Served]:
    """Run ``pt-deploy serve``, on a free port unless `words` name one, until the block ends.

    Args:
        scratch: Its temporary folder, made if it does not exist; log and home folder lie beside it.
        *words: Of the command line.
        models: How many are served; each has a line in the startup banner.
        **environment: Variables for it.

    Raises:
        AssertionError: It ended before it was ready; with its log.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    log_path = scratch.with_name(f"{scratch.name}.log")
    path = [str(_TESTS), str(_TESTS.parent), os.environ.get("PYTHONPATH", "")]
    variables = {
        "PYTHONPATH": os.pathsep.join(path),
        "TMPDIR": str(scratch),
        "PT_DEPLOY_HOME": str(scratch.with_name(f"{scratch.name}-home")),
        **environment,
    }
    with (
        log_path.open("w") as log,
        subprocess.Popen(
            [sys.executable, "-m", "mlflow_pt_deploy.cli", "serve", "--port", "0", *words],
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as process,
    ):
        try:
            assert process.stdout
            first = process.stdout.readline()
            found = re.match(r"\S+ on (https?://\S+) ", first)
            assert found, first + log_path.read_text()
            banner = "".join([first, *(process.stdout.readline() for _ in range(1 + models))])
            yield Served(process, found[1], banner, scratch, log_path)
        finally:
            process.kill()


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
    return port


def until(condition: Callable[[], object], seconds: float = 30) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"the condition did not hold within {seconds} s"
        time.sleep(0.005)


def request(body: object, head: bytes = JSON_HEAD) -> bytes:
    """A whole request; `body` is sent as JSON unless it is bytes."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return head + b"Content-Length: %d\r\n\r\n" % len(data) + data


class RawResponse(NamedTuple):
    """A response as it came over a socket; header names in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """One connection, its responses read one by one."""

    def __init__(self, url: str, timeout: float = 30) -> None:
        host, port = url.partition("://")[2].split(":")
        self.socket = socket.create_connection((host, int(port)), timeout=timeout)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._stream = self.socket.makefile("rb")

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def read(self, *, head_only: bool = False) -> RawResponse:
        """The next response; without its body if it was asked for with HEAD.

        Raises:
            EOFError: The server closed the connection.
        """
        line = self._stream.readline()
        if not line:
            raise EOFError
        lines = [each.decode("latin1").strip() for each in iter(self._stream.readline, b"\r\n")]
        headers = {
            name.lower(): value.strip() for name, _, value in (x.partition(":") for x in lines)
        }
        size = 0 if head_only else int(headers.get("content-length", 0))
        return RawResponse(int(line.split()[1]), headers, self._stream.read(size))

    def ask(self, data: bytes) -> RawResponse:
        """Send a request and read its response."""
        self.send(data)
        return self.read()

    def is_closed(self) -> bool:
        """Whether the server closes the connection before the timeout, whatever it sends first."""
        try:
            while self.socket.recv(65536):
                pass
        except TimeoutError:
            return False
        except ConnectionError:
            return True
        return True

    def close(self) -> None:
        self._stream.close()
        self.socket.close()
