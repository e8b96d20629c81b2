"""HTTP as clients really speak it, against ``pt-deploy serve``: odd but legal requests."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from tiny.server import JSON_HEAD, Client, Served, request, started, until
from tiny.serving import save_tiny

BODY = b'{"inputs": ["red"]}'
WHOLE = request(BODY)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("connections")
    model = save_tiny(folder / "tiny")
    words = ("--access-log", "--log-format", "json", "--replicas", "1")
    with started(folder / "scratch", str(model), *words) as served:
        yield served


@pytest.fixture
def client(server: Served) -> Iterator[Client]:
    with Client(server.url) as made:
        yield made


def label(response: object) -> str:
    return str(response.json()["predictions"][0]["label"])  # type: ignore[attr-defined]


def test_a_connection_is_kept_alive(client: Client) -> None:
    for word in ("red", "green", "red", "blue"):
        assert label(client.ask(request({"inputs": [word]}))) == word
    assert client.ask(request(b'{"inputs": ["red"!')).status == 400
    assert client.ask(b"GET /model HTTP/1.1\r\nHost: x\r\n\r\n").json()["model"] == "tiny"
    assert client.ask(WHOLE).status == 200


@pytest.mark.parametrize("size", [10**6, 50, 7], ids=["whole", "50 bytes", "7 bytes"])
def test_pipelined_requests_are_answered_in_order(client: Client, size: int) -> None:
    words = ["red", "explode", "blue", "green", "red"]
    sent = b"".join(request({"inputs": [word]}) for word in words)
    sent += b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    for at in range(0, len(sent), size):
        client.send(sent[at : at + size])
    answers = [client.read() for _ in words]
    assert [each.status for each in answers] == [200, 500, 200, 200, 200]
    assert [label(each) for each in answers if each.status == 200] == [
        "red",
        "blue",
        "green",
        "red",
    ]
    assert client.read().status == 200
    assert client.is_closed()


def test_connection_close_is_obeyed(client: Client) -> None:
    assert label(client.ask(request(BODY, JSON_HEAD + b"Connection: close\r\n"))) == "red"
    assert client.is_closed()


def test_http_1_0_is_answered_and_closed(client: Client) -> None:
    head = JSON_HEAD.replace(b"HTTP/1.1\r\nHost: x", b"HTTP/1.0")
    assert label(client.ask(request(BODY, head))) == "red"
    assert client.is_closed()


@pytest.mark.parametrize("path", [b"/livez", b"/readyz", b"/ping", b"/model", b"/metrics"])
def test_head_has_the_headers_of_get_and_no_body(client: Client, path: bytes) -> None:
    client.send(b"HEAD " + path + b" HTTP/1.1\r\nHost: x\r\n\r\n")
    head = client.read(head_only=True)
    get = client.ask(b"GET " + path + b" HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (head.status, get.status) == (200, 200), "the next response follows at once"
    assert head.headers["content-type"] == get.headers["content-type"]


@pytest.mark.parametrize("size", [1, 5, 100])
def test_chunked_bodies(client: Client, size: int) -> None:
    parts = [BODY[at : at + size] for at in range(0, len(BODY), size)]
    chunks = b"".join(b"%x;name=value\r\n%s\r\n" % (len(part), part) for part in parts)
    client.send(JSON_HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n")
    assert label(client.read()) == "red"
    assert client.ask(WHOLE).status == 200


def test_trailers_are_not_headers(client: Client) -> None:
    chunks = b"%x\r\n%s\r\n0\r\n" % (len(BODY), BODY)
    trailers = b"X-Deadline-Ms: 0\r\nContent-Type: text/plain\r\nX-Request-Id: stolen\r\n\r\n"
    client.send(JSON_HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + trailers)
    answer = client.read()
    assert answer.status == 200
    assert answer.headers["x-request-id"] != "stolen"
    assert client.ask(WHOLE).status == 200


def test_expect_100_continue(client: Client) -> None:
    head, _, body = request(BODY, JSON_HEAD + b"Expect: 100-continue\r\n").partition(b"\r\n\r\n")
    client.send(head + b"\r\n\r\n")
    assert client.read().status == 100
    assert label(client.ask(body)) == "red"


@pytest.mark.parametrize(
    "head",
    [
        JSON_HEAD.replace(b"Content-Type", b"content-TYPE"),
        JSON_HEAD.replace(b": ", b":"),
        JSON_HEAD.replace(b": application", b":  \t application"),
        JSON_HEAD.replace(b"application/json", b"Application/JSON; charset=utf-8;"),
        JSON_HEAD.replace(b"/invocations", b"/invocations?a=b&c"),
        JSON_HEAD.replace(b"/invocations", b"http://x/invocations"),
        JSON_HEAD.replace(b"/invocations", b"/models/tiny/invocations"),
        b"\r\n" + JSON_HEAD,
        JSON_HEAD + b"X-Long: " + b"a" * 6000 + b"\r\n",
        JSON_HEAD + b"".join(b"X-%d: y\r\n" % number for number in range(60)),
        JSON_HEAD + b"X-Odd: \xc3\xa9\xff\r\n",
        JSON_HEAD
        + b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABk\r\n",
        JSON_HEAD + b"Upgrade: websocket\r\nConnection: Upgrade\r\n",
    ],
    ids=range(13),
)
def test_odd_but_legal_requests_are_answered(client: Client, head: bytes) -> None:
    answer = client.ask(request(BODY, head))
    assert (answer.status, label(answer)) == (200, "red")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_with_http2_gets_its_answer(server: Served) -> None:
    command = [
        "curl",
        "-sS",
        "--http2",
        "-H",
        "Content-Type: application/json",
        "-d",
        BODY.decode(),
    ]
    done = subprocess.run(
        [*command, f"{server.url}/invocations"], capture_output=True, check=False, timeout=30
    )
    if b"does not support" in done.stderr:
        pytest.skip("this curl has no HTTP/2")
    assert json.loads(done.stdout)["predictions"][0]["label"] == "red", done.stderr


@pytest.mark.parametrize(
    "sent",
    [
        b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 7\r\n\r\n",
        b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /invocations HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\nBad Name: y\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"nonsense\r\n\r\n",
    ],
    ids=["two lengths", "negative length", "bad chunk", "bad name", "TLS", "nonsense"],
)
def test_illegal_requests_end_their_connection_only(
    server: Served, client: Client, sent: bytes
) -> None:
    client.send(sent)
    assert client.is_closed()
    with Client(server.url) as other:
        assert other.ask(WHOLE).status == 200


def test_a_request_id_is_in_the_response_and_the_log(server: Served, client: Client) -> None:
    answers = [
        client.ask(request(BODY, JSON_HEAD + b"X-Request-Id: my-id-7\r\n")),
        client.ask(WHOLE),
        client.ask(request(b"{")),
        client.ask(b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n"),
    ]
    ids = [answer.headers["x-request-id"] for answer in answers]
    assert ids[0] == "my-id-7"
    assert len(set(ids)) == 4
    until(lambda: all(each in server.log for each in ids))
    lines = [json.loads(line) for line in server.log.splitlines()]
    statuses = {line.get("request_id"): line["status"] for line in lines if "route" in line}
    assert [statuses[each] for each in ids] == [200, 200, 400, 404]


def test_all_log_lines_have_one_shape(server: Served) -> None:
    lines = [json.loads(line) for line in server.log.splitlines()]
    assert lines
    assert all({"time", "level", "message"} <= line.keys() for line in lines)


def requests_total(server: Served) -> Counter[str]:
    """Counted responses of the model by status."""
    text = requests.get(f"{server.url}/metrics", timeout=10).text
    found = re.findall(r'^pt_deploy_requests_total\{.*status="(\d+)".*\} (\S+)$', text, re.M)
    counts: Counter[str] = Counter()
    for status, count in found:
        counts[status] += int(float(count))
    return counts


def test_every_request_is_answered_once_in_order_and_counted(server: Served) -> None:
    """Clients of all manners at once: what they got is what they asked, and was counted."""
    before = requests_total(server)

    def one(seed: int) -> Counter[str]:
        chance, got = random.Random(seed), Counter[str]()
        client = Client(server.url)
        for _ in range(40):
            number = chance.choice([1, 1, 1, 1, 2, 3])
            words = chance.choices(["red", "green", "blue", "explode"], [5, 5, 5, 1], k=number)
            extra = chance.choice([b"", b"", b"X-Deadline-Ms: 90000\r\n", b"X-A: %d\r\n" % seed])
            sent = b"".join(request({"inputs": [word]}, JSON_HEAD + extra) for word in words)
            cut = chance.choice([len(sent), len(sent), chance.randrange(1, len(sent))])
            for piece in filter(None, (sent[:cut], sent[cut:])):
                client.send(piece)
            for word in words:
                answer = client.read()
                got[str(answer.status)] += 1
                assert answer.status == (500 if word == "explode" else 200)
                assert word == "explode" or label(answer) == word
            if chance.random() < 0.05:
                client.close()
                client = Client(server.url)
        client.close()
        return got

    with ThreadPoolExecutor(8) as pool:
        got = sum(pool.map(one, range(8)), Counter[str]())
    until(lambda: requests_total(server) - before == got)
