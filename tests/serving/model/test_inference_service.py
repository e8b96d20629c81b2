"""The inference service: batches of an event loop iteration, inline, fast stage, batcher."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import requests
from tiny.server import running, until
from tiny.serving import predict, save_tiny, tiny_variant

from mlflow_pt_deploy.errors import DeadlineError, OverloadedError
from mlflow_pt_deploy.model_config import ServingOptions
from mlflow_pt_deploy.registry.addresses import source
from mlflow_pt_deploy.runtimes.base import Inputs, Logits
from mlflow_pt_deploy.runtimes.cascade import CascadePredictor
from mlflow_pt_deploy.serving.app import Application
from mlflow_pt_deploy.serving.batching.request import RequestContext
from mlflow_pt_deploy.serving.lifecycle.served_model import ServedModel
from mlflow_pt_deploy.serving.model import inference_service as module
from mlflow_pt_deploy.serving.model.inference_service import InferenceService

WAYS = ("inline", "fast stage", "batcher")


class GatedModel:
    """The tiny model, which waits at a gate and counts the rows of its batches."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.batches: list[int] = []

    def __call__(self, inputs: Inputs) -> Logits:
        self.batches.append(len(inputs["input_ids"]))
        assert self.gate.wait(10)
        return predict(inputs)


def new_service(model: Any, way: str = "batcher", **options: Any) -> InferenceService:
    """A service that scores in one way, whatever it would have measured on this machine."""
    loaded = replace(tiny_variant(), predict=model)
    service = InferenceService(loaded, ServingOptions.from_config(options))  # type: ignore[arg-type]
    service.runs_inline = way == "inline"
    service.fast_stage_runs_inline = way == "fast stage"
    return service


def submit(service: InferenceService, *rows: str, **context: Any) -> asyncio.Future[list[str]]:
    return service.submit(rows, 1, RequestContext(**context))


def labels(texts: list[str]) -> list[str]:
    return [json.loads(text)["label"] for text in texts]


async def holds(condition: Callable[[], object]) -> None:
    """Wait until a condition holds, without blocking the loop."""
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.001)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await asyncio.wait_for(test(), 20)

    asyncio.run(main())


@pytest.mark.parametrize("way", ["inline", "batcher"])
def test_requests_of_one_event_loop_iteration_are_one_batch(way: str) -> None:
    model = GatedModel()
    service = new_service(model, way)

    async def test() -> None:
        model.gate.set() if way == "inline" else model.gate.clear()
        first = submit(service, "red")
        if way == "batcher":  # the idle model takes the first alone, all others wait for it
            await holds(lambda: model.batches)
        futures = [submit(service, word) for word in ("green", "blue", "red green green")]
        await asyncio.sleep(0)
        model.gate.set()
        assert labels(await first) == ["red"]
        assert [labels(await each) for each in futures] == [["green"], ["blue"], ["green"]]

    run(test)
    assert model.batches == ([4] if way == "inline" else [1, 3])


def test_more_rows_than_a_batch_holds_run_inline_in_several(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They had all gone to the micro-batcher's threads."""
    model = GatedModel()
    service = new_service(model, "inline", max_batch_rows=4)
    monkeypatch.setattr(service.batcher, "submit_nowait", None)

    async def test() -> None:
        futures = [submit(service, f"red {number}", f"tan {number}") for number in range(5)]
        for each in futures:
            assert labels(await each) == ["red", "red"]

    run(test)
    assert model.batches == [4, 4, 2]


def test_an_inline_batch_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_INLINE_ROWS", 3)
    model = GatedModel()
    service = new_service(model, "inline")

    async def test() -> None:
        futures = [submit(service, word) for word in ["red", "tan"] * 4]
        for each in futures:
            assert labels(await each) == ["red"]

    run(test)
    assert model.batches == [2, 2, 2], "3, 3 and 2 rows, equal ones computed once"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("word", ["explode", "nan"])
def test_a_failing_row_fails_only_its_own_request(way: str, word: str) -> None:
    service = new_service(CascadePredictor(predict, predict, 0.7), way)

    async def test() -> None:
        good = [submit(service, *rows) for rows in (["red"], ["green green", "blue"], ["blue"])]
        bad = submit(service, "red", word)
        good.append(submit(service, "green"))
        assert [labels(await each) for each in good] == [
            ["red"],
            ["green", "blue"],
            ["blue"],
            ["green"],
        ]
        with pytest.raises(Exception, match="exploded" if word == "explode" else "not finite"):
            await bad

    run(test)
    until(lambda: not service.batcher.concurrency.busy)


def test_a_cascade_hands_only_unsure_requests_to_the_batcher() -> None:
    strong = GatedModel()
    service = new_service(CascadePredictor(predict, strong, 0.7), "fast stage")
    computed: list[int] = []
    service.batcher.executor.on_call = lambda rows, *_: computed.append(rows)

    async def test() -> None:
        assert labels(await submit(service, "red red", "blue blue")) == ["red", "blue"]
        assert computed == []
        assert labels(await submit(service, "green")) == ["green"]
        assert computed == [1]
        assert labels(await submit(service, "green green", "red")) == ["green", "red"]
        assert computed == [1, 2]

    run(test)


@pytest.mark.parametrize("way", WAYS)
def test_an_expired_request_is_not_computed(way: str) -> None:
    model = GatedModel()
    service = new_service(
        CascadePredictor(model, model, 0.7) if way == "fast stage" else model, way
    )

    async def test() -> None:
        late = submit(service, "red", expires_at=time.monotonic())
        with pytest.raises(DeadlineError, match="the request's own deadline"):
            await late

    run(test)
    assert model.batches == []


def test_a_deadline_is_kept_while_the_request_is_queued() -> None:
    model = GatedModel()
    service = new_service(model)

    async def test() -> None:
        model.gate.clear()
        first = submit(service, "red")
        await holds(lambda: model.batches)
        late = submit(service, "blue", expires_at=time.monotonic() + 0.05)
        with pytest.raises(DeadlineError):
            await late
        assert not first.done()
        model.gate.set()
        assert labels(await first) == ["red"]
        assert labels(await submit(service, "green")) == ["green"]

    run(test)
    assert model.batches == [1, 1]


def test_queued_rows_of_a_disconnected_client_are_dropped() -> None:
    model = GatedModel()
    service = new_service(model)

    async def test() -> None:
        model.gate.clear()
        first = submit(service, "red")
        await holds(lambda: model.batches)
        context = RequestContext()
        left = service.submit(["blue"], 1, context)
        await holds(lambda: service.batcher.queued_rows)
        context.disconnected = True
        left.cancel()
        model.gate.set()
        assert labels(await first) == ["red"]
        await holds(lambda: not service.batcher.concurrency.busy)

    run(test)
    assert model.batches == [1]


def test_a_full_queue_rejects() -> None:
    model = GatedModel()
    service = new_service(model, queue_rows=1)

    async def test() -> None:
        model.gate.clear()
        first = submit(service, "red")
        await holds(lambda: model.batches)
        second, third = submit(service, "green"), submit(service, "blue")
        with pytest.raises(OverloadedError, match=r"queue_rows is 1\); retry later"):
            await third
        model.gate.set()
        assert labels(await first + await second) == ["red", "green"]

    run(test)


def test_the_loop_does_not_wait_for_a_model_that_is_running() -> None:
    model = GatedModel()
    service = new_service(model, "inline")

    async def test() -> None:
        assert service.batcher.concurrency.try_acquire()  # as if a thread were in the model
        waiting = submit(service, "red")
        await holds(lambda: service.batcher.queued_rows)
        assert model.batches == []
        service.batcher._release()
        assert labels(await waiting) == ["red"]

    run(test)


def test_a_fault_in_one_iteration_does_not_stop_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    service = new_service(GatedModel(), "inline")

    async def test() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        with monkeypatch.context() as patch:
            patch.setattr(service, "_score", lambda requests: 1 / 0)
            submit(service, "red")
            await asyncio.sleep(0.01)
        assert labels(await submit(service, "blue")) == ["blue"]

    run(test)


def test_pending_requests_count_before_the_body_is_read() -> None:
    service = new_service(GatedModel())
    service._loop_cost.request_s = 1e-3
    assert service.rejection(0.1, in_flight=10) == ""
    assert "estimated wait 50 ms" in service.rejection(0.1, in_flight=50)
    assert service.rejection(None, in_flight=500) == ""


def test_a_slow_model_rejects_expires_and_drops(tmp_path: Path) -> None:
    """Over HTTP: 429 when the queue is full, 504 in time, and no work for clients that left."""
    config = {"max_batch_rows": 1, "queue_rows": 3}
    model = ServedModel("slow", source(str(save_tiny(tmp_path / "slow", predict_s=0.002)), config))
    model.open()
    assert model.current
    batcher = model.current.pyfunc.service.batcher
    gated = batcher.executor._predict = GatedModel()
    gated.gate.clear()

    def ask(text: str, timeout: float = 10, **headers: str) -> requests.Response:
        body = {"inputs": [text]}
        return requests.post(f"{url}/invocations", json=body, headers=headers, timeout=timeout)

    with running(Application({"slow": model})) as url, ThreadPoolExecutor(12) as pool:
        first = pool.submit(ask, "red")
        until(lambda: gated.batches)
        late = ask("blue", **{"X-Deadline-Ms": "50"})
        assert (late.status_code, late.json()["error_code"]) == (504, "DEADLINE_EXCEEDED")
        with pytest.raises(requests.ReadTimeout):
            ask("green", timeout=0.2)
        assert batcher.queued_rows == 2, "dropped when the next batch is formed"
        waiting = [pool.submit(ask, f"red {n}") for n in range(8)]
        until(lambda: sum(each.done() for each in waiting) == 7)
        gated.gate.set()
        answers = [each.result() for each in waiting]
        assert first.result().status_code == 200
        until(lambda: not batcher.concurrency.busy)
    statuses = [answer.status_code for answer in answers]
    assert statuses.count(429) == 7, "one more row fits into the queue"
    assert statuses.count(200) == 8 - statuses.count(429)
    for answer in answers:
        if answer.status_code == 429:
            assert answer.headers["retry-after"] == "1"
            assert "retry later" in answer.json()["message"]
    assert len(gated.batches) == 1 + statuses.count(200)
