"""Hostile clients against ``pt-deploy serve``, while a normal client is served."""

from __future__ import annotations

import json
import random
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pyarrow as pa
import pytest
import requests
from tiny.clients import BEARER, HEAD, PARQUET, TOKEN, behaved, metric, parquet, post, resident_mb
from tiny.server import JSON_HEAD, Client, Served, request, started, until
from tiny.serving import save_tiny

BODY = b'{"inputs": ["red"]}'
WHOLE = request(BODY, HEAD)
KEEP_ALIVE_S = 1.5
MAX_BODY = 2**19
MEGABYTE = b"x" * 2**20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("hostile")
    model = save_tiny(folder / "tiny")
    words = ["--replicas", "1", "--keep-alive-s", str(KEEP_ALIVE_S), "--max-body-mb", "0.5"]
    with started(folder / "scratch", str(model), *words, PT_DEPLOY_TOKEN=TOKEN) as served:
        yield served


@pytest.mark.parametrize(
    "sent",
    [b"", WHOLE[:40], WHOLE[: -len(BODY) - 2], b"\r\n", b"P"],
    ids=["silent", "half a head", "no end of the head", "CRLF", "one byte"],
)
@pytest.mark.parametrize("answered", [False, True], ids=["new", "after a request"])
def test_a_connection_that_sends_no_request_is_closed(
    server: Served, sent: bytes, answered: bool
) -> None:
    with behaved(server.url), Client(server.url, timeout=10 * KEEP_ALIVE_S) as client:
        if answered:
            assert client.ask(WHOLE).status == 200
        client.send(sent)
        assert client.is_closed()


def test_dripping_does_not_keep_a_connection_open(server: Served) -> None:
    with behaved(server.url), ExitStack() as stack:
        clients = [stack.enter_context(Client(server.url)) for _ in range(8)]
        end = time.monotonic() + 20 * KEEP_ALIVE_S
        left = list(clients)
        while left:
            assert time.monotonic() < end, f"{len(left)} of 8 connections are open"
            for number, client in enumerate(left):
                with suppress(OSError):
                    client.send(b"\r\n" if number % 2 else b"X-A: b\r\n")
            time.sleep(0.1)
            left = [client for client in left if not closed_already(client)]


def closed_already(client: Client) -> bool:
    client.socket.settimeout(0.001)
    return client.is_closed()


def test_half_closed_connections_are_closed(server: Served) -> None:
    with behaved(server.url), ExitStack() as stack:
        clients = [stack.enter_context(Client(server.url)) for _ in range(4)]
        for client, sent in zip(clients, (b"", WHOLE[:40], WHOLE[:-3], WHOLE), strict=True):
            client.send(sent)
            client.socket.shutdown(socket.SHUT_WR)
        for client in clients:
            assert client.is_closed()


def test_slow_clients_hold_up_no_other(server: Served) -> None:
    with behaved(server.url) as statuses, ExitStack() as stack:
        clients = [stack.enter_context(Client(server.url)) for _ in range(60)]
        for client in clients:
            client.send(WHOLE[: len(WHOLE) - len(BODY) + 5])  # all heads, and a part of the body
        before = len(statuses)
        until(lambda: len(statuses) > before + 20)
        for byte in WHOLE[len(WHOLE) - len(BODY) + 5 :]:  # slow, but the body is completed
            clients[-1].send(bytes([byte]))
            time.sleep(0.01)
        assert clients[-1].read().status == 200


def test_clients_that_do_not_read_cost_little_memory(server: Served) -> None:
    sent = WHOLE * (256 * 2**10 // len(WHOLE))
    before = resident_mb(server.url)
    with behaved(server.url) as statuses, ExitStack() as stack:
        for _ in range(20):
            client = stack.enter_context(Client(server.url))
            client.socket.settimeout(0.05)
            with suppress(TimeoutError):
                for _ in range(16):
                    client.send(sent)
        before_count = len(statuses)
        until(lambda: len(statuses) > before_count + 20)
        assert resident_mb(server.url) - before < 100


def test_connections_over_the_limit_wait_and_are_served(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "tiny")
    words = ["--replicas", "1", "--max-connections", "8", "--keep-alive-s", "1"]
    with started(tmp_path / "scratch", str(model), *words) as served, ExitStack() as stack:
        for _ in range(12):
            stack.enter_context(Client(served.url))
        answer = requests.post(f"{served.url}/invocations", json={"inputs": ["red"]}, timeout=60)
        assert answer.status_code in (200, 503)
        until(lambda: requests.get(f"{served.url}/livez", timeout=60).status_code == 200, 60)


@pytest.mark.parametrize(
    ("method", "path", "token", "status"),
    [
        ("POST", "/invocations", "wrong", 401),
        ("POST", "/invocations", TOKEN, 413),
        ("POST", "/nothing", TOKEN, 404),
        ("PUT", "/invocations", TOKEN, 405),
        ("POST", "/livez", TOKEN, 405),
        ("GET", "/model", "wrong", 401),
        ("GET", "/livez", TOKEN, 200),
    ],
)
@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_a_body_is_read_before_its_request_is_refused(
    server: Served, method: str, path: str, token: str, status: int, chunked: bool
) -> None:
    """Otherwise a proxy such as nginx takes the response for a failure of the server."""
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n".encode()
    with Client(server.url) as client:
        for _ in range(2):  # the connection stays usable
            if chunked:
                client.send(head + b"Transfer-Encoding: chunked\r\n\r\n")
                for at in range(0, len(MEGABYTE), 2**16):
                    client.send(b"10000\r\n" + MEGABYTE[at : at + 2**16] + b"\r\n")
                client.send(b"0\r\n\r\n")
            else:
                client.send(request(MEGABYTE, head))
            answer = client.read()
            assert answer.status == status
        assert client.ask(WHOLE).status == 200
    if status == 413:
        assert f"longer than {MAX_BODY} bytes" in answer.json()["message"]


def test_a_huge_body_is_refused_without_being_read(server: Served) -> None:
    head = HEAD + b"Content-Length: 1000000000000\r\n\r\n"
    with behaved(server.url), Client(server.url) as client:
        client.send(head + MEGABYTE[:1000])
        assert client.read().status == 413


@pytest.mark.parametrize(
    ("body", "media", "status"),
    [
        (b'{"inputs": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "application/json", 400),
        (b'{"inputs":' * 50_000, "application/json", 400),
        (json.dumps({"inputs": ["red"] * 40_000}).encode(), "application/json", 400),
        (
            json.dumps({"dataframe_records": [{str(n): 1} for n in range(20_000)]}).encode(),
            "application/json",
            400,
        ),
        (b'{"inputs": ["red"]}', "application/xml", 415),
        (b'{"inputs": ["red"]}', "multipart/form-data; boundary=x", 415),
        (rb'{"inputs": ["\ud800 red"]}', "application/json", 200),
        (rb'{"inputs": ["red"], "params": {"\udfff": 1}}', "application/json", 200),
        (b'{"inputs": [1e999]}', "application/json", 400),
        (b'{"inputs": [' + b"9" * 10_000 + b"]}", "application/json", 400),
        (b"\x00" * 1000, "application/json", 400),
        (b"text\n" + b"red\n" * 100_000, "text/csv", 400),
        (parquet(pa.array([b"r\xffd"]).view(pa.string())), PARQUET, 400),
        (parquet(pa.array([b"r\xffd"]).view(pa.string()).dictionary_encode()), PARQUET, 400),
    ],
    ids=range(14),
)
def test_one_hostile_body(server: Served, body: bytes, media: str, status: int) -> None:
    with behaved(server.url):
        assert post(server.url, body, media).status_code == status


def test_damaged_parquet_files_end_nothing(server: Served) -> None:
    """Some of them end the process where Arrow is asked for what their footer says of a column."""
    whole, chance = parquet(pa.array(["red", "green", "blue"] * 4)), random.Random(0)
    with behaved(server.url):
        for at in range(len(whole) // 4, len(whole), 3):
            body = bytearray(whole)
            body[at] ^= 1 << chance.randrange(8)
            assert post(server.url, bytes(body), PARQUET).status_code in (200, 400)
        assert post(server.url, whole, PARQUET).status_code == 200


def test_a_storm_of_disconnects(server: Served) -> None:
    sent = request({"inputs": ["red green"] * 3}, HEAD)
    chance = random.Random(0)
    with behaved(server.url):
        for _ in range(300):
            with suppress(OSError), Client(server.url) as client:
                client.send(sent[: chance.choice([len(sent), chance.randrange(len(sent))])])
                reset = struct.pack("ii", 1, 0)
                client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
    until(lambda: metric(server.url, "pt_deploy_in_flight") == 0)


def test_refused_and_failed_requests_are_counted(server: Served) -> None:
    name = "pt_deploy_errors_total"
    before = metric(server.url, name)
    with Client(server.url) as client:
        statuses = [
            client.ask(request(b"{", HEAD)).status,
            client.ask(request(BODY, JSON_HEAD)).status,
            client.ask(request(MEGABYTE, HEAD)).status,
            client.ask(request(b'{"inputs": ["explode"]}', HEAD)).status,
        ]
    assert statuses == [400, 401, 413, 500]
    until(lambda: metric(server.url, name) == before + 4)


def test_many_equal_failures_do_not_flood_the_log(server: Served) -> None:
    before = len(server.log)
    with requests.Session() as session:
        session.headers.update(BEARER)
        for _ in range(200):
            answer = session.post(f"{server.url}/invocations", json={"inputs": ["explode"]})
            assert answer.status_code == 500
    written = server.log[before:]
    assert written.count("the model failed") <= 120, "60 a minute, in two minutes at most"
    assert "secret /path" not in answer.text


def test_openapi_describes_what_is_answered(server: Served) -> None:
    document = requests.get(f"{server.url}/openapi.json", timeout=5).json()
    assert document["openapi"].startswith("3.1")
    assert "/models/tiny/invocations" in document["paths"]
    bodies = [b"{}", b'{"inputs": ["red"]}', b'{"inputs": null}', b"", b"[]"]
    chance = random.Random(1)
    with requests.Session() as session:
        session.headers.update(BEARER)
        for path, operations in document["paths"].items():
            for method in ("get", "post", "put", "delete", "options"):
                media = {"Content-Type": chance.choice(["application/json", "text/csv", "a/b"])}
                url, body = server.url + path, chance.choice(bodies)
                answer = session.request(method, url, data=body, headers=media, timeout=5)
                if method in operations:
                    assert str(answer.status_code) in operations[method]["responses"], path
                else:
                    assert answer.status_code == 405, path
                assert answer.status_code < 500 or answer.status_code == 501
