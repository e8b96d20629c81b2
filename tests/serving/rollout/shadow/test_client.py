"""The sending side: samples in few messages; what is not taken at once is dropped and counted."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from mlflow_pt_deploy.serving.rollout.shadow.client import FLUSH_BYTES, ShadowClient
from mlflow_pt_deploy.serving.rollout.shadow.message import (
    MAX_BYTES,
    new_address,
    new_socket,
    unpack,
)
from mlflow_pt_deploy.serving.rollout.shadow.plan import SHADOW, ShadowPlan, ShadowTarget

TEXT = '{"label": "red", "score": 1.0}'


def plan(share: float) -> dict[str, ShadowPlan]:
    target = ShadowTarget(SHADOW, "models:/tiny@challenger", share, "4")
    return {"tiny": ShadowPlan("tiny", "3", ("red",), "text", targets=(target,))}


@pytest.fixture
def client(tmp_path: Path) -> Iterator[ShadowClient]:
    with closing(ShadowClient(tmp_path)) as client:
        client.follow(plan(1.0))
        yield client


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[socket.socket]:
    with new_socket() as receiver:
        receiver.bind(new_address(tmp_path).path)
        receiver.settimeout(5)
        yield receiver


def offer(client: ShadowClient, rows: list[str], count: int = 1, version: str = "3") -> None:
    async def run() -> None:
        for number in range(count):
            client.offer("tiny", version, f"id-{number}", rows, [TEXT] * len(rows))
        client.flush()

    asyncio.run(run())


def test_requests_go_together_after_a_moment(client: ShadowClient, receiver: socket.socket) -> None:

    async def run() -> None:
        for number in range(3):
            client.offer("tiny", "3", f"id-{number}", [f"row {number}"], [TEXT])
        assert client.sent["tiny"] == 0, "the responses go first"
        while not client.sent["tiny"]:
            await asyncio.sleep(0.005)

    asyncio.run(run())
    samples = unpack(receiver.recv(MAX_BYTES))
    assert [sample.rows for sample in samples] == [["row 0"], ["row 1"], ["row 2"]]
    assert client.sent["tiny"] == 3


def test_other_versions_and_other_ids_are_not_sampled(
    client: ShadowClient, receiver: socket.socket
) -> None:
    client.follow(plan(0.2))
    offer(client, ["red"], version="2")
    assert not client.sent
    offer(client, ["red"], 500)
    assert 60 < client.sent["tiny"] < 140
    client.follow(plan(0.0) | {})
    assert "tiny" not in client.targets


def test_much_is_sent_in_several_messages_soon(
    client: ShadowClient, receiver: socket.socket
) -> None:
    async def run() -> None:
        for _ in range(9):
            client.offer("tiny", "3", "id", ["x" * FLUSH_BYTES], [TEXT])
        sent = client.sent["tiny"]
        await asyncio.sleep(0)
        assert (sent, client.sent["tiny"]) == (6, 9)

    asyncio.run(run())
    assert [len(unpack(receiver.recv(MAX_BYTES))) for _ in range(3)] == [3, 3, 3]


def test_what_is_not_taken_is_dropped_and_counted(client: ShadowClient, tmp_path: Path) -> None:
    offer(client, ["red"])  # no process
    assert (client.sent["tiny"], client.dropped["tiny"]) == (0, 1)
    with new_socket() as receiver:
        receiver.bind(new_address(tmp_path).path)
        for _ in range(600):  # the process reads nothing
            offer(client, ["x" * 10_000])
        assert client.dropped["tiny"] > 1
        assert client.sent["tiny"] + client.dropped["tiny"] == 601


@pytest.mark.parametrize("row", ["x" * MAX_BYTES, "ש" * (MAX_BYTES * 2 // 3)])
def test_rows_that_are_too_long_are_dropped(
    client: ShadowClient, receiver: socket.socket, row: str
) -> None:
    offer(client, [row])
    assert (client.sent["tiny"], client.dropped["tiny"]) == (0, 1)


def test_without_a_run_directory_nothing_is_sent() -> None:
    client = ShadowClient()
    assert not client.targets
