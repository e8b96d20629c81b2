"""Inline, fast stage and micro-batcher give the same answers and errors over HTTP."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests
from tiny.server import running
from tiny.serving import save_tiny

from mlflow_pt_deploy.registry.addresses import source
from mlflow_pt_deploy.serving.app import Application
from mlflow_pt_deploy.serving.lifecycle.served_model import ServedModel

WAYS = ("inline", "fast stage", "batcher")


class Ways:
    """One saved model behind a server for each way of scoring."""

    def __init__(self, urls: dict[str, str]) -> None:
        self.urls = urls

    def post(self, way: str, body: Any, **headers: str) -> requests.Response:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | headers
        return requests.post(f"{self.urls[way]}/invocations", data, headers=headers, timeout=10)


@pytest.fixture(scope="module")
def ways(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ways]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "true")
        # the cascade's fast model is not sure of one word
        folder = str(save_tiny(tmp_path_factory.mktemp("ways") / "tiny", unsure_below=0.7))
        applications = []
        for way in WAYS:
            model = ServedModel("tiny", source(folder))
            model.open()
            assert model.current
            service = model.current.pyfunc.service
            service.runs_inline = way == "inline"
            service.fast_stage_runs_inline = way == "fast stage"
            applications.append(Application({"tiny": model}))
        first, second, third = applications
        with running(first) as a, running(second) as b, running(third) as c:
            yield Ways(dict(zip(WAYS, (a, b, c), strict=True)))


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


def test_all_ways_give_the_same_answers_and_errors(ways: Ways) -> None:
    chance = random.Random(0)
    for _ in range(150):
        body, headers = some_request(chance)
        first, *others = (ways.post(way, body, **headers) for way in WAYS)
        for other in others:
            assert (other.status_code, other.json()) == (first.status_code, first.json()), body
            for name in ("content-type", "x-model-version", "retry-after"):
                assert other.headers.get(name) == first.headers.get(name), body


@pytest.mark.parametrize("way", WAYS)
def test_one_bad_row_fails_alone_among_many_clients(ways: Ways, way: str) -> None:
    def ask(word: str) -> tuple[str, int]:
        return word, ways.post(way, {"inputs": [word]}).status_code

    words = (["red", "green", "blue", "red green"] * 4 + ["explode", "nan"]) * 4
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, words))
    assert len(answers) == len(words)
    for word, status in answers:
        assert status == (500 if word in ("explode", "nan") else 200), word
