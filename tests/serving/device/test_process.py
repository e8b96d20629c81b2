"""The process answers workers, one model a connection, and ends when it should."""

from __future__ import annotations

import gc
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest
from tiny.server import until

from mlflow_pt_deploy.artifacts import load_variant, read_manifest
from mlflow_pt_deploy.errors import ArtifactError, ServingError
from mlflow_pt_deploy.serving.device.channel import (
    HELLO,
    OPEN,
    PREDICT,
    WARM_UP,
    Arrays,
    Channel,
    Message,
    raise_error,
)
from mlflow_pt_deploy.serving.device.executor import HeldModel
from mlflow_pt_deploy.serving.device.process import HANG_STATUS, DeviceProcess, watch

from .conftest import VARIANT, key_of

OPENING = {
    "request": OPEN,
    "folder": str(VARIANT),
    "key": list(key_of(read_manifest(VARIANT).digest)),
}
LOADED = load_variant(VARIANT)
BATCH = LOADED.preprocessor(["my card was declined", "a refund"])


class Worker:
    """A connection to a process that runs in this one."""

    def __init__(self, process: DeviceProcess) -> None:
        left, right = socket.socketpair()
        self.channel = Channel(left)
        self.channel.set_timeout(30)
        self.answers = threading.Thread(target=process.answer, args=(Channel(right),))
        self.answers.start()

    def ask(self, header: dict[str, Any], arrays: Arrays | None = None) -> Message:
        self.channel.send(header, arrays)
        reply = self.channel.receive()
        raise_error(reply.header)
        return reply

    def close(self) -> None:
        self.channel.close()
        self.answers.join(30)
        assert not self.answers.is_alive()


@pytest.fixture
def process() -> DeviceProcess:
    return DeviceProcess("cpu")


@pytest.fixture
def worker(process: DeviceProcess) -> Iterator[Worker]:
    with closing(Worker(process)) as worker:
        yield worker


def test_a_worker_gets_the_logits_of_its_rows(worker: Worker) -> None:
    assert worker.ask({"request": HELLO}).header["devices"] == ["cpu"]
    assert worker.ask(OPENING).header == {"pads": False}
    found = worker.ask({"request": PREDICT}, BATCH).arrays["logits"]
    np.testing.assert_array_equal(found, LOADED.predict(BATCH))


def held_models() -> list[HeldModel]:
    gc.collect()
    return [each for each in gc.get_objects() if type(each) is HeldModel]


def test_a_model_is_freed_when_the_last_connection_ends(process: DeviceProcess) -> None:
    first, second = Worker(process), Worker(process)
    for each in (first, second):
        each.ask(OPENING)
    freed = weakref.ref(held_models()[-1])
    first.close()
    assert second.ask({"request": PREDICT}, BATCH).arrays["logits"].shape[0] == 2
    second.close()
    assert freed() is None


def test_buckets_are_prepared_by_a_model_that_has_them(worker: Worker) -> None:
    worker.ask(OPENING)
    worker.ask({"request": WARM_UP, "sizes": [32, 2048, 64]})  # it has none
    seen: list[tuple[int, ...]] = []
    predictor = held_models()[-1].loaded.predict
    type(predictor).warm_up_buckets = lambda self, *sizes: seen.append(sizes)  # type: ignore[attr-defined]
    try:
        worker.ask({"request": WARM_UP, "sizes": [32, 2048, 64]})
    finally:
        del type(predictor).warm_up_buckets  # type: ignore[attr-defined]
    assert seen == [(32, 2048, 64)]


IDS = BATCH["input_ids"]


@pytest.mark.parametrize(
    ("header", "arrays", "reason"),
    [
        ({"request": "shutdown"}, {}, "unknown request"),
        ({}, {}, "unknown request"),
        (OPENING, {}, "has a model already"),
        ({"request": PREDICT}, {}, "inputs of its model"),
        ({"request": PREDICT}, {"input_ids": IDS}, "inputs of its model"),
        ({"request": PREDICT}, {**BATCH, "more": IDS}, "inputs of its model"),
        ({"request": PREDICT}, {name: array[:0] for name, array in BATCH.items()}, "inputs"),
        ({"request": PREDICT}, {name: array[0] for name, array in BATCH.items()}, "inputs"),
        ({"request": PREDICT}, {**BATCH, "attention_mask": IDS[:1]}, "inputs of its model"),
        ({"request": WARM_UP, "sizes": [1, 2]}, {}, "no sizes"),
        ({"request": WARM_UP, "sizes": [1, 2, "3"]}, {}, "no sizes"),
    ],
)
def test_an_invalid_request_is_refused_and_the_next_answered(
    worker: Worker, header: dict[str, Any], arrays: Arrays, reason: str
) -> None:
    worker.ask(OPENING)
    with pytest.raises(ServingError, match=reason):
        worker.ask(header, arrays)
    assert worker.ask({"request": PREDICT}, BATCH).arrays["logits"].shape[0] == 2


@pytest.mark.parametrize("header", [{"request": PREDICT}, {"request": WARM_UP, "sizes": [1, 2, 3]}])
def test_a_connection_without_a_model_computes_nothing(
    worker: Worker, header: dict[str, Any]
) -> None:
    with pytest.raises(ServingError, match="no model yet"):
        worker.ask(header, BATCH)


def test_a_model_that_is_not_loaded_is_an_error_of_its_class(worker: Worker) -> None:
    for folder in ("/nowhere", VARIANT.parent):
        with pytest.raises(ArtifactError):
            worker.ask({**OPENING, "folder": str(folder)})
    worker.ask(OPENING)


def test_what_is_no_message_ends_the_connection(
    worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    worker.channel._socket.sendall(b"\xff" * 8)
    with pytest.raises((EOFError, ConnectionError)):
        worker.channel.receive()
    assert "a connection ends: a message has a header of" in caplog.text


def test_a_batch_that_hangs_ends_the_process() -> None:
    code = (
        "import os\n"
        "from mlflow_pt_deploy.serving.device.process import watch\n"
        "watch(os.getppid(), lambda: 5.0, 4.0)"
    )
    found = subprocess.run([sys.executable, "-c", code], timeout=60, check=False)
    assert found.returncode == HANG_STATUS


def test_the_process_ends_with_the_main_process(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []

    def end(status: int) -> None:
        ended.append(status)
        raise SystemExit

    monkeypatch.setattr("os._exit", end)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as main:

        def run() -> None:
            with pytest.raises(SystemExit):
                watch(main.pid, lambda: 99.0, 0.0)

        thread = threading.Thread(target=run)
        thread.start()
        assert not ended
        main.kill()
        until(lambda: ended)
        thread.join(10)
    assert ended == [0]
