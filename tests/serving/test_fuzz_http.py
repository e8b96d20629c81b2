"""Random requests in random pieces: legal and illegal ones over raw connections."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import NamedTuple

import pytest
import requests
from tiny.clients import BEARER, HEAD, TOKEN, behaved
from tiny.server import Served, request, started, until
from tiny.serving import save_tiny

SCRIPTS, CONVERSATIONS = 1000, 250
CONNECTIONS = 24
SILENCE_S = 2.0
LENGTH = b"Content-Length: "
ALLOWED = {100, 200, 400, 401, 404, 405, 408, 413, 414, 415, 417, 429, 431, 501, 505}
CLOSING = b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


class Sent(NamedTuple):
    """A request, and the text that it scores."""

    data: bytes
    text: str


class Answer(NamedTuple):
    """A response; `label` and `score` only if it holds one prediction."""

    status: int
    label: str = ""
    score: float = 0.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("fuzz")
    model = save_tiny(folder / "tiny")
    words = (str(model), "--replicas", "1", "--keep-alive-s", "5")
    with started(folder / "scratch", *words, PT_DEPLOY_TOKEN=TOKEN) as served:
        yield served


@pytest.fixture(scope="module")
def expected(server: Served) -> dict[str, Answer]:
    """The right response to each of 30 texts; no two are the same."""
    words = ("red", "green", "blue")
    texts = [" ".join([word] * count) for word in words for count in range(1, 11)]
    answer = requests.post(
        f"{server.url}/invocations", json={"inputs": texts}, headers=BEARER, timeout=30
    )
    found = {
        text: Answer(200, row["label"], row["score"])
        for text, row in zip(texts, answer.json()["predictions"], strict=True)
    }
    assert len(set(found.values())) == 30
    return found


def body_of(text: str) -> bytes:
    return json.dumps({"inputs": [text]}).encode()


def chunked(head: bytes, body: bytes, chance: random.Random) -> bytes:
    """A request with a chunked body in random pieces, with extensions and a trailer at times."""
    cuts = sorted({0, len(body), *(chance.randrange(len(body)) for _ in range(3))})
    extension = chance.choice([b"", b"", b";a=b", b';a="b"'])
    chunks = b"".join(
        b"%x%s\r\n%s\r\n" % (end - at, extension, body[at:end]) for at, end in pairwise(cuts)
    )
    trailer = chance.choice([b"", b"X-Trailer: y\r\n"])
    return head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n" + trailer + b"\r\n"


def legal(text: str, chance: random.Random) -> Sent:
    """A request that must be answered with the right prediction."""
    extra = b"".join(
        chance.sample(
            [
                b"X-Deadline-Ms: 90000\r\n",
                b"User-Agent: a\r\nAccept: */*\r\n",
                b"Connection: keep-alive\r\n",
                b"X-Odd: \xc3\xa9\r\n",
                b"Upgrade: h2c\r\nConnection: Upgrade\r\n",
            ],
            chance.choice([0, 0, 0, 1, 2]),
        )
    )
    head = chance.choice(
        [
            HEAD,
            HEAD,
            HEAD.replace(b"/invocations", b"/models/tiny/invocations?a=b"),
            HEAD.replace(b"Content-Type", b"CONTENT-type"),
            HEAD.replace(b": Bearer", b":bearer"),
        ]
    )
    if chance.random() < 0.2:
        return Sent(chunked(head + extra, body_of(text), chance), text)
    return Sent(request(body_of(text), head + extra), text)


def without_authorization(data: bytes, chance: random.Random) -> bytes:
    """The same request of a client that does not know the token."""
    wrong = chance.choice([b"Bearer wrong", b"Basic " + TOKEN.encode(), b"Bearer 0123", b""])
    return re.sub(rb"(?i)(authorization:) ?bearer \w+", rb"\1 " + wrong, data, count=1)


Mutation = Callable[[bytes, random.Random], bytes]


def after_head(extra: bytes) -> Mutation:
    """Add header lines."""
    return lambda data, chance: data.replace(b"\r\n\r\n", b"\r\n" + extra + b"\r\n", 1)


def replaced(old: bytes, *new: bytes) -> Mutation:
    return lambda data, chance: data.replace(old, chance.choice(new), 1)


def place_in_head(data: bytes, chance: random.Random) -> int:
    """A random index in the head; a changed body might hold another valid text."""
    return chance.randrange(max(20, data.find(b"\r\n\r\n")))


def flipped(data: bytes, chance: random.Random) -> bytes:
    at = place_in_head(data, chance)
    return data[:at] + bytes([chance.randrange(256)]) + data[at + 1 :]


def inserted(data: bytes, chance: random.Random) -> bytes:
    at = place_in_head(data, chance)
    return data[:at] + chance.choice([b"\0", b"\t", b"\n", b"\r", b" ", b":", b"\xff"]) + data[at:]


def removed(data: bytes, chance: random.Random) -> bytes:
    at = place_in_head(data, chance)
    return data[:at] + data[at + chance.choice([1, 1, 2, 20]) :]


MUTATIONS: Sequence[Mutation] = (
    flipped,
    inserted,
    removed,
    lambda data, chance: data[: chance.randrange(1, len(data))],
    lambda data, chance: data.replace(b"\r\n", b"\n"),
    lambda data, chance: chance.choice([b"\r\n", b"\r\n\r\n", b"\n", b" "]) + data,
    replaced(LENGTH, b"Content-Length : ", b"X-Content-Length: ", b"Content-Length: 7\r\nX: "),
    replaced(LENGTH, b"Content-Length: +", b"Content-Length: 0x", b"Content-Length: -"),
    replaced(LENGTH, b"Content-Length: 9", b"Content-Length: 0", b"Content-Length:\t"),
    replaced(LENGTH, b"Content-Length: 99999999999999999999"),
    replaced(b"chunked", b"xchunked", b"gzip, chunked", b"chunked, gzip", b"identity"),
    after_head(b"Transfer-Encoding: chunked\r\n"),
    after_head(b"Content-Length: 5\r\n"),
    after_head(b"Expect: 100-continue\r\n"),
    after_head(b"Expect: 200-ok\r\n"),
    after_head(b"Connection: close\r\n"),
    after_head(b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"),
    after_head(b"Content-Encoding: gzip\r\n"),
    after_head(b"X-A: a\r\n b\r\n"),
    after_head(b": v\r\n"),
    after_head(b"no colon\r\n"),
    after_head(b"X-Nul: \0\r\n"),
    after_head(b"X-Long: " + b"a" * 100_000 + b"\r\n"),
    after_head(b"".join(b"X-%d: y\r\n" % number for number in range(300))),
    after_head(b"Host: y\r\n"),
    after_head(b"X-Deadline-Ms: 0\r\n"),
    replaced(b"Host: x\r\n", b"", b"Host: x\r", b"Host: x\n"),
    replaced(b"HTTP/1.1", b"HTTP/1.0", b"HTTP/1.2", b"HTTP/2.0", b"http/1.1", b""),
    replaced(b"POST ", b"post ", b"PUT ", b"GET ", b"FOO ", b"CONNECT ", b"OPTIONS ", b""),
    replaced(b"/invocations", b"http://x/invocations", b"*", b"/%69nvocations", b"//invocations"),
    replaced(b"/invocations", b"/invocations#a", b"/invoc\xc3\xa4tions", b"/model", b"/livez"),
    replaced(b"application/json", b"text/csv", b"a/b", b"", b"application/json; charset=latin1"),
    replaced(b'"inputs"', b'"instances"', b'"input"', b'"inputs": ["a"], "instances"'),
    replaced(b'["', b"[", b'[["', b'["\\ud800', b'["\xff'),
    replaced(b'"]}', b'"', b'"], "params": {"top_k": 99}}', b'"]}}', b'", null]}'),
    lambda data, chance: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + data,
    lambda data, chance: b"\x16\x03\x01\x02\x00\x01" + data,
)


def in_pieces(data: bytes, chance: random.Random) -> list[bytes]:
    """Cut data nowhere, somewhere, in many places, or around each byte of its beginning."""
    count = chance.choice([0, 0, 1, 1, 6, len(data) - 1])
    places = range(1, min(count, 200)) if count > 6 else chance.choices(range(len(data)), k=count)
    return [data[at:end] for at, end in pairwise(sorted({0, len(data), *places}))]


async def read_answer(reader: asyncio.StreamReader) -> Answer:
    """The next response.

    Raises:
        AssertionError: The server sent something else.
        IncompleteReadError: The connection ended.
    """
    head = await reader.readuntil(b"\r\n\r\n")
    found = re.match(rb"HTTP/1\.[01] (\d{3}) ", head)
    assert found, head
    status = int(found[1])
    length = re.search(rb"(?i)\r\ncontent-length: (\d+)\r\n", head)
    assert length or status == 100, head
    body = await reader.readexactly(int(length[1]) if length else 0)
    if status != 200 or not body.startswith(b'{"predictions"'):
        return Answer(status)
    first = json.loads(body)["predictions"][0]
    return Answer(status, first["label"], first["score"])


def is_subsequence(some: Sequence[Answer], whole: Sequence[Answer]) -> bool:
    rest = iter(whole)
    return all(each in rest for each in some)


async def play(url: str, seed: int, expected: dict[str, Answer]) -> list[int]:
    """Send legal requests, then illegal and pipelined ones; returns the statuses."""
    chance = random.Random(seed)
    address = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(*address)
    answers: list[Answer] = []
    scored: list[Answer] = []
    try:
        for _ in range(chance.choice([0, 1, 2])):
            sent = legal(chance.choice(list(expected)), chance)
            writer.write(sent.data)
            answer = await asyncio.wait_for(read_answer(reader), 30)
            assert answer == expected[sent.text], seed
        stream = b""
        for _ in range(chance.choice([1, 1, 2, 3])):
            sent = legal(chance.choice(list(expected)), chance)
            data = sent.data
            if chance.random() < 0.2:
                data = without_authorization(data, chance)
            else:
                scored.append(expected[sent.text])
            for _ in range(chance.choice([0, 1, 1, 2])):
                data = chance.choice(MUTATIONS)(data, chance)
            stream += data
        for piece in in_pieces(stream + CLOSING, chance):
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(chance.choice([0, 0, 0.001]))
        while True:
            answers.append(await asyncio.wait_for(read_answer(reader), SILENCE_S))
    except (asyncio.IncompleteReadError, ConnectionError, TimeoutError) as error:
        assert not getattr(error, "partial", b""), (seed, error)
    finally:
        writer.close()
    statuses = [answer.status for answer in answers]
    assert set(statuses) <= ALLOWED | {504}, (seed, statuses)
    known = set(expected.values())
    assert is_subsequence([each for each in answers if each in known], scored), (seed, answers)
    return statuses


async def converse(url: str, seed: int, expected: dict[str, Answer]) -> list[int]:
    """Send legal requests, pipelined and in pieces, some without the token; returns statuses."""
    chance = random.Random(seed)
    reader, writer = await asyncio.open_connection(*url.removeprefix("http://").split(":"))
    statuses = []
    for _ in range(chance.randrange(1, 12)):
        requests_ = []
        for _ in range(chance.choice([1, 1, 1, 2, 3, 8])):
            sent = legal(chance.choice(list(expected)), chance)
            if chance.random() < 0.1:
                requests_.append((without_authorization(sent.data, chance), Answer(401)))
            else:
                requests_.append((sent.data, expected[sent.text]))
        for piece in in_pieces(b"".join(data for data, _ in requests_), chance):
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(chance.choice([0, 0, 0.001]))
        for _, right in requests_:
            assert await asyncio.wait_for(read_answer(reader), 30) == right, seed
            statuses.append(right.status)
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()
    return statuses


def run_all(play_one: Callable[[int], object], count: int) -> Counter[int]:
    """Run so many conversations, some at a time; returns how often each status came."""
    statuses: Counter[int] = Counter()

    async def main() -> None:
        slots = asyncio.Semaphore(CONNECTIONS)

        async def one(seed: int) -> None:
            async with slots:
                statuses.update(await play_one(seed))  # type: ignore[misc]

        await asyncio.gather(*map(one, range(count)))

    asyncio.run(main())
    return statuses


def test_illegal_requests(server: Served, expected: dict[str, Answer]) -> None:
    with behaved(server.url):
        statuses = run_all(lambda seed: play(server.url, seed, expected), SCRIPTS)
    assert {200, 400, 401, 404, 405} <= statuses.keys()
    assert statuses[400] > 100
    assert "Traceback" not in server.log


def requests_total(server: Served) -> Counter[int]:
    """Counted responses of the model by status."""
    text = requests.get(f"{server.url}/metrics", headers=BEARER, timeout=10).text
    found = re.findall(r'^pt_deploy_requests_total\{.*status="(\d+)".*\} (\S+)$', text, re.M)
    counts: Counter[int] = Counter()
    for status, count in found:
        counts[int(status)] += int(float(count))
    return counts


def test_legal_requests_are_answered_in_order_and_counted(
    server: Served, expected: dict[str, Answer]
) -> None:
    before = requests_total(server)
    seen = run_all(lambda seed: converse(server.url, seed, expected), CONVERSATIONS)
    assert seen[200] > 10 * seen[401] / 2 > 0
    until(lambda: requests_total(server) - before == seen)
