"""Hostile clients on real ports, and beside them one that behaves and is served all the time."""

import json
import random
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import requests
from tiny.server import running, until
from tiny.serving import save_tiny

from mlflow_pt_deploy.registry.addresses import source
from mlflow_pt_deploy.serving.app import Application
from mlflow_pt_deploy.serving.lifecycle.served_model import ServedModel
from mlflow_pt_deploy.serving.observability.access_log import AccessLog

connection = pytest.importorskip("mlflow_pt_deploy.serving.connection")
PATH = "/models/tiny/invocations"  # only where requests are counted
PARQUET = "application/vnd.apache.parquet"
HEAD = b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


class Count(AccessLog):
    """How many answers of which status the server says it gave to requests to score."""

    def __init__(self) -> None:
        self.statuses: list[int] = []

    def write(self, route: str, label: str, result: Any, seconds: float) -> None:
        if route == PATH:
            self.statuses.append(result.status)


@pytest.fixture(scope="module", params=[True, False], ids=["quick", "threads"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Count]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "true")
        slot = ServedModel("tiny", source(str(save_tiny(tmp_path_factory.mktemp("hostile") / "tiny"))))
        slot.open()
        assert slot.current
        slot.current.pyfunc.quick = request.param
        count = Count()
        app = Application({"tiny": slot}, access=count)
        with running(app, http=connection.Connection, proxy_headers=False) as url:
            yield url, count


@contextmanager
def behaved(url: str) -> Iterator[list[int]]:
    """A client that behaves, until the block ends; its answers' statuses."""
    ends, statuses = threading.Event(), []

    def client() -> None:
        with requests.Session() as session:
            while not ends.is_set():
                answer = session.post(f"{url}/invocations", json={"inputs": ["red"]}, timeout=10)
                statuses.append(answer.status_code)

    thread = threading.Thread(target=client)
    thread.start()
    try:
        until(lambda: statuses)
        yield statuses
        before = len(statuses)
        until(lambda: len(statuses) > before)  # it still is
    finally:
        ends.set()
        thread.join(10)
    assert set(statuses) == {200}


def connect(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def parquet(column: pa.Array) -> bytes:
    buffer = BytesIO()
    pq.write_table(pa.table({"text": column}), buffer, store_schema=False)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("body", "media", "status"),
    [
        (b"x" * 10 * 2**20, "application/json", 413),
        (b'{"inputs": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "application/json", 400),
        (b'{"inputs":' * 50_000, "application/json", 400),
        (json.dumps({"inputs": ["red"] * 100_000}).encode(), "application/json", 400),
        (b'{"inputs": ["red"]}', "application/xml", 415),
        (b'{"inputs": ["red"]}', "multipart/form-data; boundary=x", 415),
        (rb'{"inputs": ["\ud800 red"]}', "application/json", 200),
        (rb'{"inputs": ["red"], "params": {"\udfff": 1}}', "application/json", 200),
        (b'{"inputs": [1e999]}', "application/json", 400),
        (b'{"inputs": [' + b"9" * 10_000 + b"]}", "application/json", 400),
        (b"\x00" * 1000, "application/json", 400),
        (parquet(pa.array([b"r\xffd"]).view(pa.string())), PARQUET, 400),
        (parquet(pa.array([b"r\xffd"]).view(pa.string()).dictionary_encode()), PARQUET, 400),
    ],
)
def test_one_hostile_request(
    server: tuple[str, Count], body: bytes, media: str, status: int
) -> None:
    with behaved(server[0]):
        try:
            answer = requests.post(
                f"{server[0]}/invocations", body, headers={"Content-Type": media}, timeout=20
            )
        except requests.ConnectionError:  # refused while we still sent
            assert status == 413
        else:
            assert answer.status_code == status


def same(rows: int, text: str) -> pa.Array:
    """Rows that are all the same, as a dictionary keeps them."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, "int32")), pa.array([text]))


@pytest.mark.parametrize(
    ("column", "why"),
    [
        (same(2_000_000, "red"), "2000000 rows; one request may have 1024"),
        (pa.array([[None] * 100_000], pa.list_(pa.int64())), "must be flat"),
        (pa.array(["x" * 20_000_000]), "more than 4194304 bytes"),
        (same(1000, "x" * 100_000), "more than 4194304 bytes"),
    ],
    ids=["rows", "items", "one text", "texts"],
)
def test_a_parquet_bomb_is_refused_before_it_is_unpacked(
    server: tuple[str, Count], column: pa.Array, why: str
) -> None:
    body = parquet(column)
    assert len(body) < 1_000_000
    headers = {"Content-Type": PARQUET}
    with behaved(server[0]):
        answer = requests.post(f"{server[0]}/invocations", body, headers=headers, timeout=20)
    assert answer.status_code == 400
    assert why in answer.json()["message"]


def test_damaged_parquet_files_end_nothing(server: tuple[str, Count]) -> None:
    """Some of them end the process where Arrow is asked for what their footer says of a column."""
    whole, chance = parquet(pa.array(["red", "green", "blue"] * 4)), random.Random(0)
    headers = {"Content-Type": PARQUET}
    with behaved(server[0]), requests.Session() as session:
        for at in range(len(whole) // 4, len(whole)):
            body = bytearray(whole)
            body[at] ^= 1 << chance.randrange(8)
            answer = session.post(f"{server[0]}/invocations", bytes(body), headers=headers)
            assert answer.status_code in (200, 400)


def test_slow_and_half_open_clients_hold_nobody_up(server: tuple[str, Count]) -> None:
    with behaved(server[0]) as statuses:
        open_ones = [connect(server[0]) for _ in range(60)]
        whole = HEAD + b'Content-Length: 19\r\n\r\n{"inputs": ["red"]}'
        for at, client in enumerate(open_ones):
            client.sendall(whole[: 45 + at])
            if at % 3 == 0:
                client.shutdown(socket.SHUT_WR)
        before = len(statuses)
        until(lambda: len(statuses) > before + 5)
        last = open_ones[-1]  # slow, but it comes to its end
        for byte in whole[45 + 59 :]:
            last.sendall(bytes([byte]))
        assert last.recv(4096).startswith(b"HTTP/1.1 200")
        for client in open_ones:
            client.close()


def test_a_storm_of_disconnects(server: tuple[str, Count]) -> None:
    body = json.dumps({"inputs": ["red green"] * 3}).encode()
    sent = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    chance = random.Random(0)
    with behaved(server[0]):
        for _ in range(300):
            with suppress(OSError), connect(server[0]) as client:
                client.sendall(sent[: chance.choice([len(sent), chance.randrange(len(sent))])])
                reset = struct.pack("ii", 1, 0)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)


def test_every_request_is_answered_once_and_counted_on_both_sides(
    server: tuple[str, Count],
) -> None:
    url, count = server
    mine: list[int] = []

    def client(seed: int) -> None:
        chance = random.Random(seed)
        bodies: list[Any] = [{"inputs": ["red"]}, {"inputs": [7]}, {"inputs": ["explode"]}, []]
        with requests.Session() as session:
            for _ in range(25):
                body = chance.choice(bodies)
                answer = session.post(url + PATH, json=body, timeout=10)
                mine.append(answer.status_code)

    threads = [threading.Thread(target=client, args=[seed]) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    until(lambda: len(count.statuses) >= len(mine) == 200)
    assert sorted(count.statuses) == sorted(mine)
    assert set(mine) == {200, 400, 500}


def test_what_openapi_says_is_true(server: tuple[str, Count]) -> None:
    document = requests.get(f"{server[0]}/openapi.json", timeout=5).json()
    assert document["openapi"].startswith("3.1")
    assert "/models/tiny/invocations" in document["paths"]
    bodies = [b"{}", b'{"inputs": ["red"]}', b'{"inputs": null}', b"", b"[]"]
    chance = random.Random(1)
    for path, operations in document["paths"].items():
        for method in ("get", "post", "put", "delete", "options"):
            for _ in range(2):
                media = {"Content-Type": chance.choice(["application/json", "text/csv", "a/b"])}
                answer = requests.request(
                    method, server[0] + path, data=chance.choice(bodies), headers=media, timeout=5
                )
                if method in operations:
                    assert str(answer.status_code) in operations[method]["responses"], path
                else:
                    assert answer.status_code == 405, path
                assert answer.status_code < 500 or answer.status_code == 501
