"""The short way of common requests, on real ports: the same answers and errors as the long way."""

import asyncio
import json
import random
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from tiny.server import running
from tiny.serving import save_tiny

from mlflow_pt_deploy.registry.addresses import source
from mlflow_pt_deploy.serving import heads as parsed
from mlflow_pt_deploy.serving.app import Application
from mlflow_pt_deploy.serving.batching.request import Caller
from mlflow_pt_deploy.serving.http.auth import TokenAuth
from mlflow_pt_deploy.serving.http.mlflow_protocol import Answer
from mlflow_pt_deploy.serving.lifecycle.served_model import ServedModel
from mlflow_pt_deploy.serving.observability.access_log import AccessLog
from mlflow_pt_deploy.serving.observability.metrics import Metrics
from mlflow_pt_deploy.serving.short import MOST_ROWS

connection = pytest.importorskip("mlflow_pt_deploy.serving.connection")
JSON = {"Content-Type": "application/json"}


class Routes(AccessLog):
    """Keeps what the server would have written."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, int]] = []

    def write(self, route: str, label: str, result: Any, seconds: float) -> None:
        self.lines.append((route, result.status))


class Both:
    """One model behind two servers: `short` offers requests to `quick`, `long` never does."""

    def __init__(self, slot: ServedModel, short: str, long: str, routes: Routes) -> None:
        self.slot, self.short, self.long = slot, short, long
        self.routes = routes

    def post(self, url: str, body: Any, **headers: str) -> requests.Response:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return requests.post(f"{url}/invocations", data=data, headers=JSON | headers, timeout=10)


@pytest.fixture(scope="module", params=["loop", "thread", "cascade"])
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Both]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "true")
        # of one word the cascade's fast model is not sure
        habits = {"unsure_below": 0.7} if request.param == "cascade" else {}
        folder = save_tiny(tmp_path_factory.mktemp("quick") / "tiny", **habits)
        slot = ServedModel("tiny", source(str(folder)))
        slot.open()
        assert slot.current
        # whatever this machine's clock said
        slot.current.pyfunc.quick = request.param == "loop"
        slot.current.pyfunc.glances = request.param == "cascade"
        routes, options = Routes(), {"http": connection.Connection, "proxy_headers": False}
        short, long = Application({"tiny": slot}, access=routes), Application({"tiny": slot})
        long.quick = None  # type: ignore[assignment]
        with running(short, **options) as first, running(long, **options) as second:
            yield Both(slot, first, second, routes)


def some_request(chance: random.Random) -> tuple[Any, dict[str, str]]:
    """A request, mostly right, sometimes wrong in one of many ways."""
    words = ["red", "green", "blue", "", "über", "\ud800", "explode", "nan", "\x00", "red " * 99]
    rows: Any = [" ".join(chance.choices(words, k=2)) for _ in range(chance.randint(0, 6))]
    body: Any = {"inputs": rows}
    if chance.random() < 0.4:
        params = [{"top_k": at} for at in (0, 1, 2, 3, 4, True, 1.0, "2", None)]
        body["params"] = chance.choice([*params, None, {}, [], 7, {"unknown": 1}])
    if chance.random() < 0.3:
        twist: list[Any] = [
            {"inputs": "red"},
            {"inputs": [["red"]]},
            {"inputs": [None]},
            {"inputs": {"text": ["red"]}},
            {"instances": ["red"]},
            {"inputs": ["red"], "instances": ["red"]},
            {"inputs": ["red"], "other": 1},
            {},
            [],
            b'{"inputs": ["red"]',
            b"\xff",
            b"",
        ]
        body = chance.choice(twist)
    kinds = [{}, {}, {"Content-Type": "application/JSON"}, {"Content-Type": "text/plain"}]
    kinds += [{"X-Deadline-Ms": "5000"}, {"Content-Type": "application/json; charset=utf-8"}]
    return body, chance.choice(kinds)


def test_both_ways_give_the_same_answers_and_errors(both: Both) -> None:
    chance = random.Random(0)
    for _ in range(150):
        body, headers = some_request(chance)
        short, long = (both.post(url, body, **headers) for url in (both.short, both.long))
        assert (short.status_code, short.json()) == (long.status_code, long.json()), body
        for name in ("content-type", "x-model-version", "retry-after", "server"):
            assert short.headers.get(name) == long.headers.get(name), body


def test_requests_on_one_connection_are_answered_in_order(both: Both) -> None:
    bodies = [json.dumps({"inputs": rows}).encode() for rows in (["red"], ["explode"], ["blue"])]
    head = "POST {} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {}\r\n"
    sent = b"".join(
        (head.format("/invocations", len(body)) + "\r\n").encode() + body for body in bodies
    )
    sent += b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    host, port = both.short.removeprefix("http://").split(":")
    for size in (len(sent), 50, 7):  # in one piece, and cut anywhere
        with socket.create_connection((host, int(port)), timeout=10) as client:
            for at in range(0, len(sent), size):
                client.sendall(sent[at : at + size])
            answer = b"".join(iter(lambda: client.recv(65536), b""))
        parts = answer.split(b"HTTP/1.1 ")[1:]
        assert [part[:3] for part in parts] == [b"200", b"500", b"200", b"200"]
        assert b'"red"' in parts[0]
        assert b'"blue"' in parts[2]


def test_a_head_that_was_parsed_before_means_the_same(both: Both) -> None:
    """Whole requests in one piece, as few heads as possible, and what looks nearly like them."""
    rows = ["red", "blue", "green", "explode", "nan", "über", "nonsense"]
    bodies = [json.dumps({"inputs": [row]}).encode().ljust(30) for row in rows]
    bodies += [b"[" * 30, b"\xff" * 30, json.dumps({"inputs": ["red"], "params": 7}).encode()]
    heads = [
        b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n",
        b"POST /models/tiny/invocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n",
        b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\n",
        b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n",
    ]
    chance = random.Random(0)
    sent: list[list[bytes]] = []
    for _ in range(120):
        body = chance.choice(bodies)
        chunked = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
        plain = b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        whole = chance.choice(heads) + chance.choice([plain, plain, plain, chunked])
        cut = chance.randrange(1, len(whole))
        sent.append(chance.choice([[whole], [whole], [whole], [whole[:cut], whole[cut:]]]))
    for pieces in sent[::20]:  # and two of them at once
        pieces[-1] += sent[0][0] + b"".join(sent[0][1:])
    before = set(parsed._known)
    answers = [talk(url, sent) for url in (both.short, both.long)]
    assert answers[0] == answers[1]
    assert {status for status, _ in answers[0]} >= {200, 400, 404, 415, 500}
    learned = {head.split()[1] for head in set(parsed._known) - before}
    assert learned <= {b"/invocations", b"/models/tiny/invocations"}
    assert any(b"/invocations" in head for head in parsed._known)


def talk(url: str, sent: list[list[bytes]]) -> list[tuple[int, Any]]:
    """Statuses and bodies of requests on one connection, each sent piece by piece."""
    host, port = url.removeprefix("http://").split(":")
    answers: list[tuple[int, Any]] = []
    with socket.create_connection((host, int(port)), timeout=10) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        stream = client.makefile("rb")
        for pieces in sent:
            for piece in pieces:
                client.sendall(piece)
                time.sleep(0.001 * (len(pieces) > 1))
            for _ in range(b"".join(pieces).count(b"POST /")):
                status = int(stream.readline().split()[1])
                fields = dict(
                    line.strip().lower().split(b": ", 1) for line in iter(stream.readline, b"\r\n")
                )
                answers.append((status, json.loads(stream.read(int(fields[b"content-length"])))))
    return answers


def test_a_known_head_is_still_asked_for_its_token(both: Both) -> None:
    body = b'{"inputs": ["red"]}'
    head = b"POST /invocations HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 19\r\n"
    whole = head + b"Authorization: Bearer 0123456789abcdef\r\n\r\n" + body
    for token, status in ((b"0123456789abcdef", 200), (b"fedcba9876543210", 401)):
        app = Application({"tiny": both.slot}, auth=TokenAuth(scoring=(token,)))
        with running(app, http=connection.Connection, proxy_headers=False) as url:
            # known from the first server on; a refusal closes the connection
            found = [talk(url, [[whole]])[0][0] for _ in range(3)]
        assert found == [status] * 3


def test_a_connection_that_shall_close_is_closed(both: Both) -> None:
    answer = both.post(both.short, {"inputs": ["red"]}, Connection="close")
    assert answer.headers["connection"] == "close"
    assert answer.json()["predictions"][0]["label"] == "red"


def test_one_bad_row_fails_alone(both: Both) -> None:
    def ask(word: str) -> tuple[str, int]:
        return word, both.post(both.short, {"inputs": [word]}).status_code

    words = (["red", "green", "blue", "red green"] * 4 + ["explode", "nan"]) * 4
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, words))
    assert len(answers) == len(words)
    for word, status in answers:
        assert status == (500 if word in ("explode", "nan") else 200), word


def test_each_answer_is_counted_once(both: Both) -> None:
    before = len(both.routes.lines)
    for body in ({"inputs": ["red"]}, {"inputs": ["explode"]}, {"inputs": []}, {"x": 1}):
        both.post(both.short, body)
    both.post(both.short, {"inputs": ["red"] * (MOST_ROWS + 1)})
    statuses = [status for _, status in both.routes.lines[before:]]
    assert statuses == [200, 500, 400, 400, 200]


def test_a_model_that_computes_already_does_not_stop_the_loop(both: Both) -> None:
    assert both.slot.current
    batcher = both.slot.current.pyfunc.service.batcher
    batcher.workers.take_on()  # as if a thread were in the model
    try:
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(both.post, both.short, {"inputs": ["red"]})
            assert requests.get(f"{both.short}/livez", timeout=5).status_code == 200
            while not batcher.queued_rows:
                assert not waiting.done()
            batcher._leave()  # it goes on with who waits
            assert waiting.result().status_code == 200
    finally:
        assert not batcher.workers.busy


def test_a_token_is_asked_for(both: Both) -> None:
    app = Application({"tiny": both.slot}, auth=TokenAuth(scoring=(b"0123456789abcdef",)))
    with running(app, http=connection.Connection, proxy_headers=False) as url:
        assert both.post(url, {"inputs": ["red"]}).status_code == 401
        right = both.post(url, {"inputs": ["red"]}, Authorization="Bearer 0123456789abcdef")
        assert right.status_code == 200


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, ServedModel]]:
    """A model that takes 0.2 s for a batch, one row a batch, three rows in the queue."""
    monkeypatch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "true")
    config = {"max_batch_rows": 1, "queue_rows": 3}
    slot = ServedModel("slow", source(str(save_tiny(tmp_path / "slow", predict_s=0.2)), config))
    slot.open()
    with running(Application({"slow": slot}), http=connection.Connection, proxy_headers=False) as url:
        yield url, slot


def test_more_than_the_queue_holds_is_refused_at_once(slow: tuple[str, ServedModel]) -> None:
    url, slot = slow

    def ask(word: str) -> tuple[int, float]:
        answer = requests.post(f"{url}/invocations", json={"inputs": [word]}, timeout=10)
        if answer.status_code == 429:
            assert answer.headers["retry-after"] == "1"
            assert "Try again later" in answer.json()["message"]
        return answer.status_code, answer.elapsed.total_seconds()

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, [f"red {n}" for n in range(12)]))
    statuses = [status for status, _ in answers]
    assert 4 <= statuses.count(200) <= 6  # one in the model, three in the queue; some meanwhile
    assert statuses.count(429) == 12 - statuses.count(200)
    assert max(seconds for status, seconds in answers if status == 429) < 0.2
    assert slot.current
    assert not slot.current.pyfunc.service.batcher.workers.busy


def test_a_deadline_is_kept_while_the_model_computes(slow: tuple[str, ServedModel]) -> None:
    url, _ = slow
    headers = {"X-Deadline-Ms": "50"}
    answer = requests.post(
        f"{url}/invocations", json={"inputs": ["red"]}, headers=headers, timeout=10
    )
    assert answer.status_code == 504
    assert answer.json()["error_code"] == "DEADLINE_EXCEEDED"
    assert answer.elapsed.total_seconds() < 0.15


def test_who_leaves_is_not_computed(slow: tuple[str, ServedModel]) -> None:
    url, slot = slow
    assert slot.current
    batcher = slot.current.pyfunc.service.batcher
    rows: list[int] = []
    batcher.executor.on_call = lambda count, *_: rows.append(count)

    def leave(word: str) -> None:
        with pytest.raises(requests.ReadTimeout):
            requests.post(f"{url}/invocations", json={"inputs": [word]}, timeout=0.05)

    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(requests.post, f"{url}/invocations", json={"inputs": ["red"]})
        while not batcher.workers.busy:
            assert not first.done()
        for _ in pool.map(leave, ("green", "blue")):  # both at once, while the first is computed
            pass
        assert first.result().status_code == 200
    while batcher.workers.busy:
        assert len(rows) < 3
    assert rows == [1]


def test_a_cascade_hands_only_open_cases_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "true")
    slot = ServedModel("tiny", source(str(save_tiny(tmp_path / "tiny", unsure_below=0.7))))
    slot.open()
    assert slot.current
    slot.current.pyfunc.glances = True
    computed: list[int] = []
    slot.current.pyfunc.service.batcher.executor.on_call = lambda rows, *_: computed.append(rows)
    with running(Application({"tiny": slot}), http=connection.Connection, proxy_headers=False) as url:

        def ask(*rows: str) -> list[str]:
            answer = requests.post(f"{url}/invocations", json={"inputs": rows}, timeout=10)
            return [each["label"] for each in answer.json()["predictions"]]

        assert ask("red red", "blue blue") == ["red", "blue"]
        assert computed == []
        assert ask("green") == ["green"]
        assert computed == [1]
        assert ask("green green", "red") == ["green", "red"]
        assert computed == [1, 2]


def test_a_turn_too_full_for_a_deadline_is_refused(
    both: Both, monkeypatch: pytest.MonkeyPatch
) -> None:
    routes = Routes()
    app = Application({"tiny": both.slot}, access=routes)
    monkeypatch.setattr(app.quick._turn, "takes_s", lambda answers: 0.05 * answers)
    answers: list[Answer | None] = []
    body = json.dumps({"inputs": ["red"]}).encode()
    hasty = {b"content-type": b"application/json", b"x-deadline-ms": b"100"}

    async def turn() -> None:
        for headers in (hasty, hasty, {b"content-type": b"application/json"}):
            refusal = app.quick.refuse(b"/invocations", headers)
            if refusal is not None:
                answers.append(refusal)
            else:
                assert app.quick.take(b"/invocations", headers, body, Caller(), answers.append)
        assert len(answers) == 1  # the second: at once, for it would wait for half of its 100 ms
        while len(answers) < 3:
            await asyncio.sleep(0.001)

    asyncio.run(turn())
    assert [answer.status for answer in answers if answer] == [429, 200, 200]
    assert sorted(status for _, status in routes.lines) == [200, 200, 429]


def test_an_error_in_a_turn_stops_none_of_the_next(
    both: Both, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = Application({"tiny": both.slot})
    answers: list[Answer | None] = []
    body = json.dumps({"inputs": ["red"]}).encode()

    async def turns() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        with monkeypatch.context() as patch:
            patch.setattr(app.quick, "_score", lambda asked: 1 / 0)
            assert app.quick.take(b"/invocations", {}, body, Caller(), answers.append)
            await asyncio.sleep(0.01)
        assert app.quick.take(b"/invocations", {}, body, Caller(), answers.append)
        while not answers:
            await asyncio.sleep(0.001)

    asyncio.run(turns())
    assert [answer.status for answer in answers if answer] == [200]


def test_who_may_not_score_learns_nothing_of_the_load(
    both: Both, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = Application({"tiny": both.slot}, auth=TokenAuth(scoring=(b"0123456789abcdef",)))
    monkeypatch.setattr(app.quick._turn, "has_room", lambda *_: False)
    answers: list[Answer | None] = []
    known = {b"authorization": b"Bearer 0123456789abcdef"}
    body = b'{"inputs": ["red"]}'

    async def turn() -> None:
        assert app.quick.take(b"/invocations", known, body, Caller(), answers.append)
        for _ in range(2):
            assert app.quick.refuse(b"/invocations", {}) is None
            refusal = app.quick.refuse(b"/invocations", known)
            assert refusal is not None
            assert refusal.status == 429
        while not answers:
            await asyncio.sleep(0.001)
        assert app.quick.refuse(b"/invocations", known) is None  # a new turn

    asyncio.run(turn())


def test_each_refusal_is_told_once(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int, bytes]] = []

    class Kept:
        def answered(self, *given: Any) -> None:
            told.append((1, given[3].status, given[5]))

    class Counted(Metrics):
        def answered(self, *given: Any) -> None:
            told.append((given[4], given[2].status, b""))

    app = Application({"tiny": both.slot}, metrics=Counted(), spans=Kept())  # type: ignore[arg-type]
    monkeypatch.setattr(app.quick._turn, "has_room", lambda *_: False)
    body = b'{"inputs": ["red"]}'

    async def turn() -> None:
        assert app.quick.take(b"/invocations", {}, body, Caller(), lambda _: None)
        for parent in (b"00-1", b"00-2"):
            assert app.quick.refuse(b"/invocations", {b"traceparent": parent})
        await asyncio.sleep(0.2)

    asyncio.run(turn())
    refused = [each for each in told if each[1] == 429]
    assert refused == [(2, 429, b""), (1, 429, b"00-1"), (1, 429, b"00-2")]


def test_a_connection_is_closed_when_it_has_rested_for_long_enough(both: Both) -> None:
    app = Application({"tiny": both.slot})
    settings: dict[str, Any] = {"http": connection.Connection, "proxy_headers": False}
    with running(app, timeout_keep_alive=1, **settings) as url:
        host, port = url.removeprefix("http://").split(":")
        body = b'{"inputs": ["red"]}'
        head = b"POST /invocations HTTP/1.1\r\nContent-Type: application/json\r\n"
        whole = head + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        with socket.create_connection((host, int(port)), timeout=10) as client:
            for _ in range(4):  # longer than a second in all, but never at rest for as long
                client.sendall(whole)
                assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
                time.sleep(0.4)
            start = time.monotonic()
            assert client.recv(65536) == b""
            assert 0.3 < time.monotonic() - start < 1.5
