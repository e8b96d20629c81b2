"""Clients with a token for the tests of hostile clients."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import requests
from tiny.server import JSON_HEAD, until

PARQUET = "application/vnd.apache.parquet"
TOKEN = "0123456789abcdef0123456789abcdef"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
HEAD = JSON_HEAD + f"Authorization: Bearer {TOKEN}\r\n".encode()


@contextmanager
def behaved(url: str) -> Iterator[list[int]]:
    """Run a normal client until the block ends; yields the statuses of its responses.

    Raises:
        AssertionError: A status is not 200, or it was not served any more.
    """
    ends, statuses = threading.Event(), list[int]()

    def client() -> None:
        with requests.Session() as session:
            session.headers.update(BEARER)
            while not ends.is_set():
                answer = session.post(f"{url}/invocations", json={"inputs": ["red"]}, timeout=20)
                statuses.append(answer.status_code)
                time.sleep(0.002)

    thread = threading.Thread(target=client)
    thread.start()
    try:
        until(lambda: statuses)
        yield statuses
        before = len(statuses)
        until(lambda: len(statuses) > before)  # it is still served
    finally:
        ends.set()
        thread.join(30)
    assert set(statuses) == {200}


def post(url: str, body: bytes, media: str) -> requests.Response:
    headers = BEARER | {"Content-Type": media}
    return requests.post(f"{url}/invocations", body, headers=headers, timeout=30)


def metric(url: str, name: str) -> float:
    """The sum of a metric's series."""
    text = requests.get(f"{url}/metrics", headers=BEARER, timeout=10).text
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))


def worker_pids(url: str) -> list[int]:
    """Process ids of the workers."""
    replicas = requests.get(f"{url}/model", headers=BEARER, timeout=10).json()["replicas"]
    return [replica["pid"] for replica in replicas]


def resident_mb(url: str) -> float:
    """Resident memory of the first worker."""
    pid = worker_pids(url)[0]
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def parquet(column: Any, compression: str = "snappy", **options: Any) -> bytes:
    """A Parquet file with the column ``text``."""
    buffer = BytesIO()
    table = pa.table({"text": column})
    pq.write_table(table, buffer, compression=compression, store_schema=False, **options)
    return buffer.getvalue()
