"""The response cache: what it answers, what it computes, what it counts, how much it keeps."""

from __future__ import annotations

import asyncio
import base64
import json
import tracemalloc
from array import array
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import picture
from tiny.server import running
from tiny.serving import predict, save_tiny, tiny_images, tiny_variant

from mlflow_pt_deploy.errors import RequestError
from mlflow_pt_deploy.model_config import ServingOptions
from mlflow_pt_deploy.registry.addresses import source
from mlflow_pt_deploy.runtimes.base import Inputs, Logits
from mlflow_pt_deploy.runtimes.cascade import CascadePredictor
from mlflow_pt_deploy.serving.app import Application
from mlflow_pt_deploy.serving.batching.request import RequestContext
from mlflow_pt_deploy.serving.lifecycle.served_model import ServedModel
from mlflow_pt_deploy.serving.model.inference_service import InferenceService
from mlflow_pt_deploy.serving.model.prediction_cache import CachedPrediction, PredictionCache
from mlflow_pt_deploy.serving.observability.prometheus import PrometheusMetrics

WAYS = ("inline", "fast stage", "batcher")


class CountingModel:
    """The tiny model, which counts the rows of its batches."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, inputs: Inputs) -> Logits:
        self.batches.append(len(inputs["input_ids"]))
        return predict(inputs)


def new_service(model: Any, way: str = "inline", max_mb: float = 1.0) -> InferenceService:
    loaded = replace(tiny_variant(), predict=model)
    service = InferenceService(loaded, ServingOptions())  # type: ignore[arg-type]
    service.runs_inline = way == "inline"
    service.fast_stage_runs_inline = way == "fast stage"
    service.cache = PredictionCache(max_mb)
    return service


def submit(service: InferenceService, *rows: str, top_k: int = 1) -> asyncio.Future[list[str]]:
    return service.submit(rows, top_k, RequestContext())


def labels(texts: list[str]) -> list[str]:
    return [json.loads(text)["label"] for text in texts]


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await asyncio.wait_for(test(), 20)

    asyncio.run(main())


@pytest.mark.parametrize("way", WAYS)
def test_a_row_is_computed_once(way: str) -> None:
    model = CountingModel()
    service = new_service(
        CascadePredictor(model, model, 0.5) if way == "fast stage" else model, way
    )

    async def test() -> None:
        first = await submit(service, "red red", "blue blue")
        computed = sum(model.batches)
        hit = submit(service, "blue blue", "red red", "red red")
        assert hit.done(), "without waiting for the next event loop iteration"
        assert await hit == [first[1], first[0], first[0]]
        assert sum(model.batches) == computed

    run(test)
    assert service.cache is not None
    assert (service.cache.hits, service.cache.misses) == (3, 2)


@pytest.mark.parametrize("way", ["inline", "batcher"])
def test_only_rows_that_are_missing_are_computed(way: str) -> None:
    model = CountingModel()
    service = new_service(model, way)

    async def test() -> None:
        await submit(service, "red", "green")
        texts = await submit(service, "blue", "green", "red", "blue blue", "red")
        assert labels(texts) == ["blue", "green", "red", "blue", "red"]

    run(test)
    assert model.batches == [2, 2]


def test_cached_rows_are_counted_like_computed_ones() -> None:
    cached, plain = new_service(predict), new_service(predict)
    plain.cache = None

    async def test() -> None:
        for service in (cached, plain):
            for rows in (["red tan"], ["red tan", "green green"], ["green green", "red tan"]):
                await submit(service, *rows)

    run(test)
    assert cached.counts == plain.counts
    assert (cached.counts.rows, cached.counts.unknown) == (5, 3)


def test_the_number_of_labels_is_part_of_the_key() -> None:
    service = new_service(predict)

    async def test() -> None:
        for _ in range(2):
            assert labels(await submit(service, "red")) == ["red"]
            (text,) = await submit(service, "red", top_k=2)
            assert [each["label"] for each in json.loads(text)] == ["red", "green"]
            (text,) = await submit(service, "red", top_k=3)
            assert len(json.loads(text)) == 3

    run(test)
    assert service.cache is not None
    assert (service.cache.hits, service.cache.misses) == (3, 3)


@pytest.mark.parametrize("way", WAYS)
def test_an_error_is_not_cached_and_hits_of_its_request_are_lost(way: str) -> None:
    service = new_service(CascadePredictor(predict, predict, 0.5), way)

    async def test() -> None:
        await submit(service, "red red")
        for _ in range(2):
            with pytest.raises(Exception, match="not finite"):
                await submit(service, "red red", "nan")
        assert labels(await submit(service, "red red")) == ["red"]

    run(test)
    assert service.counts.rows == 2


def test_a_large_body_is_encoded_only_where_it_is_missing() -> None:
    service = new_service(predict)
    rows = ["red", "green"]

    async def test() -> None:
        await submit(service, "red")
        encoded = service.encode_missing(rows, 1)
        assert encoded[0] is None and list(encoded[1] or ()) == [3]
        assert labels(await service.submit(rows, 1, RequestContext(), encoded)) == rows
        hit = service.submit(rows, 1, RequestContext(), service.encode_missing(rows, 1))
        assert labels(await hit) == rows
        stale = service.encode_missing(rows, 1)
        service.cache = PredictionCache(1.0)  # evicted between parsing and scoring
        assert labels(await service.submit(rows, 1, RequestContext(), stale)) == rows
        assert service.encode_missing(rows, 2) == service.encode(rows)

    run(test)


def test_a_row_that_cannot_be_read_keeps_its_number() -> None:
    pytest.importorskip("PIL")
    service = InferenceService(tiny_images(), ServingOptions())  # type: ignore[arg-type]
    service.cache = PredictionCache(1.0)
    red = picture("RGB", (4, 4), (255, 0, 0))

    async def test() -> None:
        await service.submit([red], 1, RequestContext(), service.encode([red]))
        assert service.counts.pieces == 0
        with pytest.raises(RequestError, match="'image' row 2"):
            service.encode_missing([red, red, b"no image"], 1)

    run(test)


def entry(text: str = "{}", tokens: int = 0) -> CachedPrediction:
    return CachedPrediction(text, (0, 0.5), array("i", range(tokens)))


def test_the_least_recently_used_rows_are_evicted() -> None:
    cache = PredictionCache(0.01)
    for number in range(100):
        cache.add(f"row {number}", 1, entry())
        assert cache.holds("row 0", 1)
        cache.lookup(["row 0"], 1)
        assert cache.bytes <= 10_000
    kept = cache.status()["rows"]
    assert 10 < kept < 30
    assert [cache.holds(f"row {number}", 1) for number in (1, 100 - kept, 101 - kept, 99)] == [
        False,
        False,
        True,
        True,
    ]


def test_a_row_larger_than_an_eighth_of_the_cache_is_not_kept() -> None:
    cache = PredictionCache(0.01)
    cache.add("row", 1, entry())
    cache.add("x" * 2000, 1, entry())
    assert cache.holds("row", 1) and not cache.holds("x" * 2000, 1)
    cache.add("row", 1, entry())
    assert cache.status()["rows"] == 1


def test_memory_is_what_the_limit_says() -> None:
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        cache = PredictionCache(1.0)
        for number in range(4000):
            text = f'{{"label": "label {number}", "score": 0.12345}}'
            top_k = 1 + number % 2
            tokens = array("i", range(20))
            cache.add(
                f"a text of usual length, number {number}",
                top_k,
                CachedPrediction(text, (number, number / 7), tokens),
            )
        used = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert 0.6e6 < used < 1.1e6, used


def ask(url: str, *texts: str, **more: Any) -> requests.Response:
    body = {"inputs": list(texts), **more}
    return requests.post(f"{url}/invocations", json=body, timeout=10)


def test_a_swap_empties_the_cache_and_the_pages_show_it(tmp_path: Path) -> None:
    metrics = PrometheusMetrics()
    file = tmp_path / "target.json"
    for name, label in (("one", "one"), ("two", "two")):
        save_tiny(tmp_path / name, label=label)
    file.write_text(json.dumps({"uri": str(tmp_path / "one")}))
    model = ServedModel("tiny", source(f"@{file}"), metrics=metrics, cache_mb=1)
    model.open()
    with running(Application({"tiny": model}, metrics=metrics)) as url:
        for _ in range(3):
            assert ask(url, "red", "blue").json()["predictions"][0]["label"] == "one"
        long = ["red", "green" + " green" * 5000]
        for _ in range(2):  # parsed on a thread
            found = [each["label"] for each in ask(url, *long).json()["predictions"]]
            assert found == ["one", "green"]
        about = requests.get(f"{url}/model", timeout=10).json()["cache"]
        assert (about["rows"], about["hits"], about["misses"]) == (2 + 1, 4 + 3, 2 + 1)
        assert about["hit_rate"] == 0.7
        assert 0 < about["mb"] < about["max_mb"] == 1
        exposed = metrics.expose().decode()
        assert 'cache_rows_total{model="tiny",result="hit",version="000000000000"} 7.0' in exposed
        file.write_text(json.dumps({"uri": str(tmp_path / "two")}))
        model.poll()
        assert ask(url, "red").json()["predictions"][0]["label"] == "two"


def test_images_are_found_before_they_are_decoded(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    model = ServedModel("tiny", source(str(save_tiny(tmp_path / "tiny", images=True))), cache_mb=1)
    model.open()
    red, blue = (
        base64.b64encode(picture("RGB", (9, 9), colour)).decode()
        for colour in ((255, 0, 0), (0, 0, 255))
    )
    assert model.current is not None
    with running(Application({"tiny": model})) as url:
        first = ask(url, red).json()["predictions"]
        decoded: list[int] = []
        preprocessor = model.current.pyfunc.loaded.preprocessor
        encode = preprocessor.encode
        object.__setattr__(
            preprocessor, "encode", lambda rows: decoded.append(len(rows)) or encode(rows)
        )
        again = ask(url, red, blue).json()["predictions"]
        assert again[0] == first[0]
        assert again[1]["label"] == "blue"
        assert decoded == [1]


def test_without_the_option_nothing_is_kept(tmp_path: Path) -> None:
    model = ServedModel("tiny", source(str(save_tiny(tmp_path / "tiny"))))
    model.open()
    assert model.current is not None
    assert model.current.pyfunc.service.cache is None
    assert model.status()["cache"] is None
