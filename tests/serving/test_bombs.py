"""Small requests that would take much memory or time, against a server with a memory limit."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import requests
from tiny.clients import PARQUET, TOKEN, behaved, parquet, post, worker_pids
from tiny.server import Served, started
from tiny.serving import save_tiny

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits memory by prlimit")

LIMIT_MB = 300
JSON, CSV = "application/json", "text/csv"
CJK = "\u4e00" * 1_300_000
MOST_S = 10.0
"""A bomb that is not recognized takes minutes."""


def data_mb(pid: int, name: str = "VmData") -> float:
    """A line of a process's status; VmData is what RLIMIT_DATA limits."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("bombs")
    model = save_tiny(folder / "tiny")
    words = (str(model), "--replicas", "1")
    with started(folder / "scratch", *words, PT_DEPLOY_TOKEN=TOKEN) as served:
        pid = worker_pids(served.url)[0]
        assert post(served.url, parquet(pa.array(["red"])), PARQUET).status_code == 200
        limit = int((data_mb(pid) + LIMIT_MB) * 2**20)
        resource.prlimit(pid, resource.RLIMIT_DATA, (limit, limit))
        yield served
        assert worker_pids(served.url) == [pid], "it was not restarted"


def send(server: Served, *bodies: bytes, media: str = JSON) -> list[requests.Response]:
    """Send bodies at the same time, beside a normal client, and check memory and time."""
    pid = worker_pids(server.url)[0]
    Path(f"/proc/{pid}/clear_refs").write_text("5")  # resets VmHWM
    before = data_mb(pid, "VmRSS")
    with behaved(server.url), ThreadPoolExecutor(len(bodies)) as pool:
        found = list(pool.map(lambda body: post(server.url, body, media), bodies))
    assert data_mb(pid, "VmHWM") - before < LIMIT_MB
    assert max(each.elapsed.total_seconds() for each in found) < MOST_S
    return found


def text_of(document: Any) -> bytes:
    return json.dumps(document, ensure_ascii=False).encode()


def records(rows: int, keys: int) -> bytes:
    """Records in which no key comes twice."""
    found = [{f"{row * keys + key:x}": 1 for key in range(keys)} for row in range(rows)]
    return text_of({"dataframe_records": found})


def split(columns: int) -> bytes:
    names = [str(number) for number in range(columns)]
    return text_of({"dataframe_split": {"columns": names, "data": [[0] * columns]}})


@pytest.mark.parametrize(
    "body",
    [
        records(20_000, 1),
        records(900, 100),
        records(1, 100_000),
        split(300_000),
        b'{"inputs": [' + b",".join([b"{}"] * 1_300_000) + b"]}",
        b'{"inputs": [' + b",".join([b'"a"'] * 1_000_000) + b"]}",
        b'{"instances": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"inputs": ["a"], "params": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
        text_of({"inputs": ["a " * 2_000_000]}),
        text_of({"inputs": ["." * 4_000_000]}),
        text_of({"inputs": ["a" * 4_000_000]}),
        text_of({"inputs": [CJK]}),
        b'{"inputs": [' + b"9" * 100_000 + b"]}",
        b'{"inputs": ["a"], "params": {"top_k": ' + b"9" * 4_000 + b"}}",
        b'{"inputs": ["a"], "params": {"top_k": 1.5}}',
        b'{"inputs": ["' + b"\\ud800" * 500_000 + b'"]}',
    ],
    ids=range(16),
)
def test_json(server: Served, body: bytes) -> None:
    (answer,) = send(server, body)
    assert answer.status_code == 400
    assert len(answer.content) < 1000


@pytest.mark.parametrize(
    "body",
    [
        b"text," + b",".join(b"c%d" % n for n in range(400_000)) + b"\na" + b"," * 400_000,
        b"text\n" + b"a" * 4_000_000,
        b"text\n" + b"a\n" * 1_500_000,
        b"text\n" + b'"' * 3_999_999,
        b"\n" * 4_000_000,
    ],
    ids=range(5),
)
def test_csv(server: Served, body: bytes) -> None:
    (answer,) = send(server, body, media=CSV)
    assert answer.status_code == 400
    assert len(answer.content) < 1000


def same(rows: int, text: str) -> pa.Array:
    """Equal rows, stored once."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, "int32")), pa.array([text]))


PLAIN = {"compression": "zstd", "use_dictionary": False}
DICTIONARY = {"compression": "zstd", "dictionary_pagesize_limit": 2**30}


@pytest.mark.parametrize(
    ("column", "options", "why"),
    [
        (same(2_000_000, "red"), {}, "2000000 rows; one request may have 1024"),
        (pa.array([[None] * 100_000], pa.list_(pa.int64())), {}, "must be flat"),
        (pa.array(["x" * 20_000_000]), PLAIN, "unpacks to too much"),
        (pa.array(["x" * 300_000_000]), PLAIN, "unpacks to too much"),
        (same(1000, "x" * 100_000), PLAIN, "unpacks to too much"),
        (pa.array(["a" * 8_000_000] * 16), DICTIONARY, "unpacks to too much"),
        (pa.array(["a" * 48_000_000] * 16), DICTIONARY, "unpacks to too much"),
    ],
    ids=["rows", "items", "one text", "one long text", "texts", "dictionary", "long dictionary"],
)
def test_parquet(server: Served, column: pa.Array, options: dict[str, Any], why: str) -> None:
    body = parquet(column, **options)
    assert len(body) < 2**20
    (answer,) = send(server, body, media=PARQUET)
    assert answer.status_code == 400
    assert why in answer.json()["message"]


@pytest.mark.parametrize(
    ("bodies", "media"),
    [
        ([parquet(pa.array(["a" * 48_000_000] * 16), **DICTIONARY)] * 4, PARQUET),
        ([text_of({"inputs": [CJK]})] * 4, JSON),
        ([records(900, 100)] * 4, JSON),
    ],
    ids=["Parquet", "long texts", "records"],
)
def test_several_at_once(server: Served, bodies: Sequence[bytes], media: str) -> None:
    assert {answer.status_code for answer in send(server, *bodies, media=media)} == {400}
