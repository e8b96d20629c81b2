"""Behind nginx with its default settings."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import requests
from tiny.clients import BEARER, TOKEN, behaved
from tiny.server import Served, started, until
from tiny.serving import save_tiny

pytestmark = pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")

# nothing here differs from nginx's defaults but paths and addresses
CONFIG = """
{user}
daemon off; worker_processes 2; pid {folder}/pid; error_log {folder}/error.log;
events {{}}
http {{
  access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  upstream models {{ server {upstream}; server {upstream}; }}
  server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://models; }} }}
}}
"""
MEGABYTE = b"x" * 2**20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("nginx")
    model = save_tiny(folder / "tiny")
    words = ["--replicas", "2", "--max-body-mb", "0.5"]
    with started(folder / "scratch", str(model), *words, PT_DEPLOY_TOKEN=TOKEN) as served:
        yield served


@pytest.fixture(scope="module")
def url(server: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("proxy")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    found = f"http://127.0.0.1:{port}"

    def is_up() -> bool:
        with suppress(requests.ConnectionError):
            return requests.get(f"{found}/livez", timeout=5).status_code == 200
        return False

    upstream = server.url.removeprefix("http://")
    user = "" if os.getuid() else "user root;"  # otherwise its workers cannot read the folder
    text = CONFIG.format(user=user, folder=folder, upstream=upstream, port=port)
    (folder / "nginx.conf").write_text(text)
    command = ["nginx", "-p", str(folder), "-c", str(folder / "nginx.conf")]
    with subprocess.Popen([*command, "-e", str(folder / "error.log")]) as process:
        try:
            until(is_up)
            yield found
        finally:
            process.terminate()


@pytest.mark.parametrize(("token", "status"), [({}, 401), (BEARER, 413)], ids=["no token", "long"])
def test_rejections_arrive_and_affect_no_other_client(
    url: str, token: dict[str, str], status: int
) -> None:
    def send(number: int) -> int:
        address = f"{url}/invocations"
        return requests.post(address, MEGABYTE, headers=token, timeout=30).status_code

    with behaved(url), ThreadPoolExecutor(8) as pool:
        assert set(pool.map(send, range(24))) == {status}


def test_a_request_through_the_proxy_is_the_same(url: str, server: Served) -> None:
    answers = [
        requests.post(f"{each}/invocations", json={"inputs": ["red"]}, headers=BEARER, timeout=10)
        for each in (url, server.url)
    ]
    assert answers[0].json() == answers[1].json()
    assert answers[0].headers["x-model-version"] == answers[1].headers["x-model-version"]
