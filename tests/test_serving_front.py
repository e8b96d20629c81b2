"""Connections lent to the thread in C: what it takes, what it refuses, and what it gives back."""

from __future__ import annotations

import array
import asyncio
import fcntl
import json
import random
import select
import socket
import sys
import termios
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
from tiny_serving import predict, running, save_tiny, until

from mlflow_pt_deploy.registry.addresses import source
from mlflow_pt_deploy.runtimes.base import Inputs, Logits
from mlflow_pt_deploy.serving import front as module
from mlflow_pt_deploy.serving.app import App
from mlflow_pt_deploy.serving.files import room_for_loans
from mlflow_pt_deploy.serving.lifecycle.served_model import Slot
from mlflow_pt_deploy.serving.observability.access_log import AccessLog

native = pytest.importorskip(
    "mlflow_pt_deploy.serving._front", reason="the part in C was not built"
)
connection = pytest.importorskip("mlflow_pt_deploy.serving.connection")

HEAD = b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
KNOWN = b"POST /known HTTP/1.1\r\nContent-Length: 4"
WHOLE = KNOWN + b"\r\n\r\nbody"


def whole(*words: str, head: bytes = HEAD) -> bytes:
    body = json.dumps({"inputs": words}).encode()
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


class Lent:
    """A socket that is lent as `name`, and its client's end."""

    def __init__(self, front: Any, name: int, busy: bool = False) -> None:
        self.client, self.server = socket.socketpair()
        self.client.settimeout(5)
        self.front, self.slot = front, front.lend(self.server.fileno(), name, busy)

    def close(self) -> None:
        self.client.close()
        self.server.close()


@pytest.fixture
def front() -> Iterator[Any]:
    made = native.Front()
    made.know(KNOWN, 4, 0)
    yield made
    made.close()


@pytest.fixture
def lent(front: Any) -> Iterator[Lent]:
    made = Lent(front, 7)
    yield made
    made.close()


def rung(front: Any, within_s: float = 0.0) -> bool:
    """Whether there is something to take."""
    return bool(select.select([front.fileno()], [], [], within_s)[0])


def taken(front: Any) -> tuple[list[Any], list[Any]]:
    """What comes next."""
    assert rung(front, 5)
    return front.take()  # type: ignore[no-any-return]


def test_a_known_request_is_taken_and_answered(front: Any, lent: Lent) -> None:
    for _ in range(3):
        before = time.perf_counter()
        lent.client.sendall(WHOLE)
        [(name, data, since)], refused = taken(front)
        assert (name, data, refused) == (7, WHOLE, [])
        assert before <= since == front.heard(lent.slot) <= time.perf_counter()
        assert front.answer(lent.slot, b"answer") == 6
        assert lent.client.recv(100) == b"answer"
    assert front.take() == ([], [])


@pytest.mark.parametrize(
    "data",
    [
        b"POST /other HTTP/1.1\r\nContent-Length: 4\r\n\r\nbody",
        WHOLE[:-1],
        WHOLE + b"x",
        WHOLE + WHOLE,
        KNOWN,
        b"\r\n\r\nbody",
        b"\x00",
        b"x" * 32 * 1024,
    ],
)
def test_whatever_else_comes_is_given_back(front: Any, lent: Lent, data: bytes) -> None:
    lent.client.sendall(data)
    until(lambda: rung(front))
    assert front.take() == ([(7, data, 0.0)], [])
    lent.client.sendall(WHOLE)  # it is read no more
    time.sleep(0.01)
    assert front.take() == ([], [])
    front.recall(lent.slot)
    assert lent.server.recv(100) == WHOLE


def test_the_end_is_given_back(front: Any, lent: Lent) -> None:
    lent.client.shutdown(socket.SHUT_WR)
    assert taken(front) == ([(7, b"", 0.0)], [])


def test_a_request_that_comes_with_the_end_is_given_back(front: Any) -> None:
    client, server = socket.socketpair()
    client.sendall(WHOLE)
    client.close()
    front.lend(server.fileno(), 1, False)
    assert taken(front) == ([(1, WHOLE, 0.0)], [])
    server.close()


def test_who_leaves_or_asks_on_before_his_answer_comes_back(front: Any) -> None:
    for rest in (WHOLE, b""):
        busy = Lent(front, 3, busy=True)
        if rest:
            busy.client.sendall(rest)
        else:
            busy.client.close()
        assert taken(front) == ([(3, rest, 0.0)], [])
        if rest:  # and may be answered still
            assert front.answer(busy.slot, b"late") == 4
            assert busy.client.recv(10) == b"late"
        front.recall(busy.slot)
        busy.close()


def test_those_beyond_the_room_are_refused_and_counted(front: Any) -> None:
    front.room(0, 2, 9, b"too many")
    clients = [Lent(front, name) for name in range(5)]
    for each in clients:
        each.client.sendall(WHOLE)
    refused = [each for each in clients if select.select([each.client], [], [], 0.2)[0]]
    assert [each.client.recv(100) for each in refused] == [b"too many"] * 3
    items, counts = taken(front)
    assert (len(items), counts) == (2, [(0, 3)])
    refused[0].client.sendall(WHOLE)  # what was taken makes room
    assert len(taken(front)[0]) == 1
    for each in clients:
        each.close()


def test_no_more_come_than_may_until_python_says_anew(front: Any) -> None:
    clients = [Lent(front, name) for name in range(7)]

    def come(first: int, last: int) -> list[bool]:
        """Whether each is let in."""
        for each in clients[first:last]:
            each.client.sendall(WHOLE)
        time.sleep(0.05)
        return [not select.select([each.client], [], [], 0)[0] for each in clients[first:last]]

    front.room(0, 9, 3, b"too many")
    assert come(0, 2) == [True, True]
    assert len(taken(front)[0]) == 2  # of which the model's queue does not know yet
    assert come(2, 4) == [True, False]
    front.room(0, 9, 2, b"too many")  # one of them waits already
    assert come(4, 6) == [True, False]
    assert [name for name, _, _ in taken(front)[0]] == [2, 4]
    front.room(0, 0, 9, b"too many")
    assert come(6, 7) == [False]
    for each in clients:
        each.close()


def unread(end: socket.socket) -> int:
    """Bytes that wait there."""
    number = array.array("i", [0])
    fcntl.ioctl(end, termios.FIONREAD, number)
    return number[0]


def test_who_reads_no_refusals_is_shut_out(front: Any, lent: Lent) -> None:
    front.room(0, 0, 9, b"x" * 1024)
    items, refused = [], 0
    while not items:
        lent.client.sendall(WHOLE)
        # one by one: what comes together is given back
        until(lambda: not unread(lent.server) or rung(front))
        items, told = front.take()
        refused += sum(number for _, number in told)
    assert [name for name, _, _ in items] == [7]
    assert refused >= 10


def test_what_is_recalled_is_read_no_more_and_its_slot_used_again(front: Any) -> None:
    first, second = Lent(front, 1), Lent(front, 2)
    front.recall(first.slot)
    first.client.sendall(WHOLE)
    third = Lent(front, 3)
    assert third.slot == first.slot
    third.client.sendall(WHOLE)
    assert [name for name, _, _ in taken(front)[0]] == [3]
    assert first.server.recv(100) == WHOLE
    for each in (first, second, third):
        each.close()


def test_heads_are_forgotten_and_learned_again(front: Any, lent: Lent) -> None:
    for at in range(1023):
        front.know(b"head %d" % at, 0, 0)
    front.know(KNOWN, 4, 0)  # known already
    with pytest.raises(ValueError, match="forget them first"):
        front.know(b"one more", 0, 0)
    lent.client.sendall(WHOLE)
    assert taken(front)[0][0][1:2] == (WHOLE,)
    front.answer(lent.slot, b"")
    front.forget()
    front.know(b"one more", 0, 0)
    lent.client.sendall(WHOLE)
    assert taken(front)[0] == [(7, WHOLE, 0.0)]


def test_requests_are_held_and_all_else_is_told_at_once(front: Any, lent: Lent) -> None:
    front.hold(0.2)
    other = Lent(front, 8)
    before = time.perf_counter()
    for each in (lent, other):
        each.client.sendall(WHOLE)
    assert [name for name, _, _ in taken(front)[0]] == [7, 8]
    assert 0.2 <= time.perf_counter() - before < 2
    front.hold(60)
    front.answer(lent.slot, b"")
    lent.client.sendall(WHOLE)
    time.sleep(0.02)
    assert not rung(front)
    other.client.close()
    assert [name for name, _, _ in taken(front)[0]] == [7, 8]
    front.answer(lent.slot, b"")
    lent.client.sendall(WHOLE)
    time.sleep(0.02)
    assert [name for name, _, _ in front.take()[0]] == [7]  # who asks is told
    front.hold(0)
    front.answer(lent.slot, b"")
    lent.client.sendall(WHOLE)
    assert len(taken(front)[0]) == 1
    other.close()


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda front: front.know(b"", -1, 0), ValueError),
        (lambda front: front.know(b"", 0, 16), ValueError),
        (lambda front: front.room(-1, 0, 0, b""), ValueError),
        (lambda front: front.room(0, 0, 0, b"x" * 1025), ValueError),
        (lambda front: front.lend(-1, 0, False), OSError),
        (lambda front: front.recall(0), ValueError),
        (lambda front: front.answer(2**31, b""), ValueError),
        (lambda front: front.heard(9), ValueError),
        (lambda front: front.know("head", 0, 0), TypeError),
        (lambda front: front.hold(b"a while"), TypeError),
    ],
)
def test_nonsense_is_an_error(
    front: Any, call: Callable[[Any], Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        call(front)


def test_closed_twice_and_with_connections_lent() -> None:
    made = native.Front()
    lent = Lent(made, 1)
    made.close()
    made.close()
    with pytest.raises(ValueError, match="lent"):
        made.recall(lent.slot)
    lent.close()


class Routes(AccessLog):
    """How many answers of which status the server says it gave."""

    def __init__(self) -> None:
        self.statuses: Counter[int] = Counter()

    def write(self, route: str, label: str, result: Any, seconds: float) -> None:
        self.statuses[result.status] += 1


class Tiny:
    """A server of the tiny model."""

    def __init__(self, app: App, url: str, routes: Routes) -> None:
        self.app, self.url, self.routes = app, url, routes

    def connect(self) -> socket.socket:
        host, port = self.url.removeprefix("http://").split(":")
        return socket.create_connection((host, int(port)), timeout=10)

    @property
    def loans(self) -> int:
        assert self.app.front is not None
        return len(self.app.front._loans)

    def on_loop(self, call: Callable[[], Any]) -> None:
        """Have the event loop do something."""
        assert self.app.front is not None
        self.app.front._loop.call_soon_threadsafe(call)


@pytest.fixture(params=["loop", "thread"])
def tiny(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Tiny]:
    monkeypatch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "true")
    slot = Slot("tiny", source(str(save_tiny(tmp_path / "tiny"))))
    slot.open()
    assert slot.current
    slot.current.pyfunc.quick = request.param == "loop"
    routes = Routes()
    app = App({"tiny": slot}, access=routes)
    options: dict[str, Any] = {"http": connection.Connection, "proxy_headers": False}
    with running(app, timeout_keep_alive=1, **options) as url:
        yield Tiny(app, url, routes)


class Client:
    """One connection, its answers read one by one."""

    def __init__(self, tiny: Tiny) -> None:
        self.socket = tiny.connect()
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.stream = self.socket.makefile("rb")

    def answer(self) -> tuple[int, Any]:
        line = self.stream.readline()
        if not line:
            raise EOFError
        fields = dict(
            field.strip().lower().split(b": ", 1) for field in iter(self.stream.readline, b"\r\n")
        )
        return int(line.split()[1]), json.loads(self.stream.read(int(fields[b"content-length"])))

    def ask(self, data: bytes) -> tuple[int, Any]:
        self.socket.sendall(data)
        return self.answer()

    def close(self) -> None:
        self.stream.close()
        self.socket.close()


def lent_clients(tiny: Tiny, number: int, head: bytes = HEAD) -> list[Client]:
    """Clients whose connections are lent, and all others are not."""
    clients = [Client(tiny) for _ in range(number)]
    for client in clients:
        for _ in range(3):
            assert client.ask(whole("red", head=head))[0] == 200
    assert tiny.loans == number
    return clients


@contextmanager
def standing_still(tiny: Tiny, first: Callable[[], Any] = lambda: None) -> Iterator[None]:
    """The event loop stands still, after it has done something, until the block ends."""
    began, ends = threading.Event(), threading.Event()
    tiny.on_loop(lambda: (first(), began.set(), ends.wait(10)))
    assert began.wait(10)
    try:
        yield
    finally:
        ends.set()


def test_a_connection_is_lent_answered_and_given_back(tiny: Tiny) -> None:
    client = Client(tiny)
    for word in ("red", "red", "red", "tan", "red"):
        status, answer = client.ask(whole(word))
        assert (status, answer["predictions"][0]["label"]) == (200, "red")
    assert tiny.loans == 1
    assert client.ask(b"GET /model HTTP/1.1\r\nHost: x\r\n\r\n")[1]["model"] == "tiny"
    assert tiny.loans == 0
    for _ in range(4):
        assert client.ask(whole("red"))[0] == 200
    assert tiny.loans == 1
    nonsense = b'{"inputs": ["red"!'
    assert client.ask(HEAD + b"Content-Length: %d\r\n\r\n" % len(nonsense) + nonsense)[0] == 400
    client.close()
    until(lambda: not tiny.loans)


def test_refused_while_python_does_something_else(tiny: Tiny) -> None:
    clients = lent_clients(tiny, 8)

    def leave_room() -> None:
        assert tiny.app.front
        limit = tiny.app.quick.room(b"/invocations", None)
        assert limit
        tiny.app.front._native.room(0, 3, 99, module.written(limit.refusal, True, []))

    before = tiny.routes.statuses.copy()
    with standing_still(tiny, leave_room):
        for client in clients:
            client.socket.sendall(whole("red"))
        refused = [client for client in clients if select.select([client.socket], [], [], 0.3)[0]]
        assert [client.answer()[0] for client in refused] == [429] * 5
    assert [client.answer()[0] for client in clients if client not in refused] == [200] * 3
    until(lambda: tiny.routes.statuses - before == Counter({429: 5, 200: 3}))
    for client in clients:  # and all goes on
        assert client.ask(whole("blue"))[1]["predictions"][0]["label"] == "blue"
        client.close()


def test_what_waited_for_too_long_is_not_computed(tiny: Tiny) -> None:
    head = HEAD + b"X-Deadline-Ms: 100\r\n"
    clients = lent_clients(tiny, 2, head)
    slot = tiny.app.front._quick._scored[b"/invocations"][1]  # type: ignore[union-attr]
    assert slot.current
    rows: list[int] = []
    slot.current.pyfunc.batcher.calls.observe = lambda count, *_: rows.append(count)
    with standing_still(tiny):
        for client in clients:
            client.socket.sendall(whole("red", head=head))
        time.sleep(0.3)
    for client in clients:
        status, answer = client.answer()
        assert (status, answer["error_code"]) == (504, "DEADLINE_EXCEEDED")
        client.close()
    assert rows == []


def test_a_turn_scores_no_more_rows_than_it_may(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlflow_pt_deploy.serving.quick.MOST_AT_ONCE", 3)
    clients = lent_clients(tiny, 8)
    turns: list[int] = []
    honest = tiny.app.quick._score
    monkeypatch.setattr(
        tiny.app.quick, "_score", lambda asked: (turns.append(len(asked)), honest(asked))
    )
    with standing_still(tiny):
        for client, word in zip(clients, ["red", "tan"] * 4, strict=True):
            client.socket.sendall(whole(word))
        time.sleep(0.1)
    for client in clients:
        assert client.answer()[1]["predictions"][0]["label"] == "red"
        client.close()
    assert turns == [3, 3, 2]


def test_where_there_was_no_room_there_will_be_soon(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    [client] = lent_clients(tiny, 1)
    assert tiny.app.front
    quick, front = tiny.app.quick, tiny.app.front
    limit = quick.room(b"/invocations", None)
    assert limit
    full = threading.Event()
    full.set()
    honest = quick.room
    monkeypatch.setattr(
        quick, "room", lambda *kind: limit._replace(waiting=0) if full.is_set() else honest(*kind)
    )
    tiny.on_loop(front._make_room)
    until(lambda: client.ask(whole("red"))[0] == 429)
    assert client.ask(whole("red"))[0] == 429
    full.clear()  # nobody says so, and nothing comes that would
    until(lambda: client.ask(whole("red"))[0] == 200)
    client.close()


def test_an_idle_connection_is_closed_and_one_in_use_is_not(tiny: Tiny) -> None:
    idle, used = lent_clients(tiny, 2)
    until_s = time.monotonic() + 2.5
    while time.monotonic() < until_s:
        assert used.ask(whole("red"))[0] == 200
        time.sleep(0.05)
    assert idle.socket.recv(10) == b""
    until(lambda: tiny.loans == 1)
    idle.close()
    used.close()


def test_the_server_ends_with_connections_lent(tmp_path: Path) -> None:
    slot = Slot("tiny", source(str(save_tiny(tmp_path / "tiny"))))
    slot.open()
    app = App({"tiny": slot})
    with running(app, http=connection.Connection, proxy_headers=False) as url:
        [client] = lent_clients(Tiny(app, url, Routes()), 1)
        began = time.monotonic()
    assert time.monotonic() - began < 3
    assert client.socket.recv(10) == b""
    client.close()


def test_every_request_is_answered_once_in_its_order(tiny: Tiny) -> None:
    """Clients of all manners at once: what they got is what they asked, and was counted."""

    def one(seed: int) -> Counter[int]:
        chance, got = random.Random(seed), Counter[int]()
        client = Client(tiny)
        for _ in range(60):
            words = [
                chance.choice(["red", "green", "blue"])
                for _ in range(chance.choice([1, 1, 1, 1, 2, 3]))
            ]
            extra = chance.choice(
                [b"", b"", b"", b"X-Deadline-Ms: 9000\r\n", b"X-A: %d\r\n" % seed]
            )
            sent = b"".join(whole(word, head=HEAD + extra) for word in words)
            cut = chance.choice([len(sent), len(sent), chance.randrange(1, len(sent))])
            for piece in (sent[:cut], sent[cut:]):
                if piece:
                    client.socket.sendall(piece)
                    time.sleep(chance.choice([0, 0, 0.001]))
            for word in words:
                status, answer = client.answer()
                got[status] += 1
                assert answer["predictions"][0]["label"] == word
            if chance.random() < 0.05:
                client.close()
                client = Client(tiny)
        client.close()
        return got

    with ThreadPoolExecutor(12) as pool:
        got = sum(pool.map(one, range(12)), Counter[int]())
    assert set(got) == {200}
    until(lambda: tiny.routes.statuses == got)
    until(lambda: not tiny.loans)


def test_who_leaves_is_not_computed_any_more(tmp_path: Path) -> None:
    slot = Slot(
        "slow", source(str(save_tiny(tmp_path / "slow", predict_s=0.1)), {"max_batch_rows": 1})
    )
    slot.open()
    routes = Routes()
    app = App({"slow": slot}, access=routes)
    with running(app, http=connection.Connection, proxy_headers=False) as url:
        tiny = Tiny(app, url, routes)
        clients = [Client(tiny) for _ in range(3)]
        with ThreadPoolExecutor(3) as pool:
            for _ in range(2):
                assert [s for s, _ in pool.map(lambda c: c.ask(whole("red")), clients)] == [200] * 3
        assert tiny.loans == 3
        before = routes.statuses.copy()
        for client, word in zip(clients, ("red", "blue", "green"), strict=True):
            client.socket.sendall(whole(word))
            time.sleep(0.02)
        clients[1].close()  # waits while the first is computed
        assert [clients[at].answer()[0] for at in (0, 2)] == [200, 200]
        until(lambda: routes.statuses - before == Counter({200: 2, 499: 1}))
        for client in clients:
            client.close()


def test_a_head_that_came_on_one_connection_is_known_on_all(tiny: Tiny) -> None:
    head = HEAD + b"X-Never-Before: %s\r\n" % tiny.url.encode()
    first, second = lent_clients(tiny, 2, head)
    for _ in range(2):  # once to be parsed, and once more, though that is not enough for a loan
        assert first.ask(whole("green", head=head))[0] == 200
        assert tiny.loans == 1
    assert second.ask(whole("green", head=head))[0] == 200
    assert tiny.loans == 1
    first.close()
    second.close()


def test_while_all_streams_compute_requests_wait_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_HOLD_S", 60)
    slot = Slot("tiny", source(str(save_tiny(tmp_path / "tiny", predict_s=0.01))))
    slot.open()
    assert slot.current
    batcher, gate = slot.current.pyfunc.batcher, threading.Semaphore(0)

    def gated(inputs: Inputs) -> Logits:
        assert gate.acquire(timeout=10)
        return predict(inputs)

    app = App({"tiny": slot}, access=Routes())
    with running(app, http=connection.Connection, proxy_headers=False) as url:
        tiny = Tiny(app, url, Routes())
        two, one, other = clients = lent_clients(tiny, 3)
        batcher.spread(gated, 2)
        two.socket.sendall(whole("red", "green"))  # a row for each stream
        until(lambda: batcher.workers.full)
        assert app.front
        with standing_still(tiny, app.front._changed):
            assert app.front._held
        one.socket.sendall(whole("tan"))
        time.sleep(0.05)
        assert batcher.queued_rows == 0
        assert other.ask(b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n")[0] == 200
        assert batcher.queued_rows == 1  # all that came is read then
        gate.release(3)
        for client in clients:
            if client is not other:
                assert client.answer()[0] == 200
            client.close()


def test_no_more_are_lent_than_may_be(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tiny.app.front
    monkeypatch.setattr(tiny.app.front, "_most", 2)
    clients = [Client(tiny) for _ in range(4)]
    for _ in range(4):
        for client in clients:
            assert client.ask(whole("red"))[0] == 200
    assert tiny.loans == 2
    for client in clients:
        client.close()


def test_files_are_asked_for_where_connections_need_them() -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, before[1]))
        assert room_for_loans(100) == 100
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 512
        assert room_for_loans(300) == 300
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (856, before[1])
        too_many = before[1] if before[1] > 0 else 2**20
        assert room_for_loans(too_many) <= max(0, too_many - 256)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_all_leave_at_once(tiny: Tiny) -> None:
    clients = lent_clients(tiny, 300)
    with standing_still(tiny):
        for at, client in enumerate(clients):
            if at % 2:
                client.socket.sendall(whole("red"))
            client.close()
    until(lambda: not tiny.loans)
    lent_clients(tiny, 1)[0].close()


def test_a_fault_ends_its_own_connection_only(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = connection.Connection.lent_request

    def fails(self: Any, data: bytes, since: float) -> None:
        if b"bad" in data:
            raise RuntimeError("a fault")
        honest(self, data, since)

    monkeypatch.setattr(connection.Connection, "lent_request", fails)
    clients = lent_clients(tiny, 3)
    for client, word in zip(clients, ("red", "bad", "tan"), strict=True):
        client.socket.sendall(whole(word))
    assert [clients[at].answer()[0] for at in (0, 2)] == [200, 200]
    assert clients[1].socket.recv(10) == b""
    until(lambda: tiny.loans == 2)
    for client in clients:
        client.close()


def test_more_heads_and_kinds_than_are_kept_are_answered_too(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MOST_HEADS", 5)
    assert tiny.app.front
    most = 0
    for deadline in range(5000, 5000 + 2 * module._MOST_KINDS):
        client = Client(tiny)
        for word in ("red", "red", "green", "green", "green"):
            head = HEAD + b"X-Deadline-Ms: %d\r\n" % (deadline if word == "red" else 9999)
            assert client.ask(whole(word, head=head))[1]["predictions"][0]["label"] == word
        most = max(most, len(tiny.app.front._known))
        client.close()
    assert 1 < most <= 5
    monkeypatch.setattr(module, "_MOST_HEADS", 1024)
    for deadline in range(6000, 6000 + 2 * module._MOST_KINDS):
        client = Client(tiny)
        head = HEAD + b"X-Deadline-Ms: %d\r\n" % deadline
        for _ in range(3):
            assert client.ask(whole("red", head=head))[0] == 200
        client.close()
        most = max(most, len(tiny.app.front._kinds))
    assert most == module._MOST_KINDS


def test_without_the_part_in_c_all_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.missing() == ""
    monkeypatch.setitem(sys.modules, "mlflow_pt_deploy.serving._front", None)
    monkeypatch.delattr("mlflow_pt_deploy.serving._front")
    assert "C compiler" in module.missing()
    slot = Slot("tiny", source(str(save_tiny(tmp_path / "tiny"))))
    slot.open()
    app = App({"tiny": slot})
    with (
        running(app, http=connection.Connection, proxy_headers=False) as url,
        requests.Session() as session,
    ):
        assert app.front is None
        for _ in range(5):
            answer = session.post(f"{url}/invocations", json={"inputs": ["red"]}, timeout=10)
            assert answer.status_code == 200
    monkeypatch.setattr(sys, "platform", "darwin")
    assert module.missing() == ""


def test_the_loop_is_the_one_that_runs() -> None:
    async def open_and_close() -> None:
        front = module.open_front(App({"a": Slot("a", source("nowhere"))}).quick, list)
        assert front is not None
        assert front._loop is asyncio.get_running_loop()
        front.close()

    asyncio.run(open_and_close())
