"""A model that can be held at a gate, behind a batcher."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from mlflow_pt_deploy.model_config import Limits
from mlflow_pt_deploy.serving.batching.batcher import Batcher
from mlflow_pt_deploy.serving.batching.request import BatchRequest

BAD = 666


class GatedModel:
    """Answers each row with (first token, number of tokens); waits while the gate is shut."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.batches: list[list[list[int]]] = []
        self.busy = 0
        self.streams = 1
        self.lock = threading.Lock()

    def collate(self, rows: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
        longest = max(map(len, rows))
        return {"ids": np.array([[*row, *[0] * (longest - len(row))] for row in rows])}

    def predict(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        with self.lock:
            self.busy += 1
            assert self.busy <= self.streams, "too many threads in the model"
        try:
            rows = [[int(token) for token in row if token] for row in inputs["ids"]]
            self.batches.append(rows)
            assert self.gate.wait(10)
            if any(row[0] == BAD for row in rows):
                raise ValueError("bad row")
            return np.array([[row[0], len(row)] for row in rows], dtype=np.float32)
        finally:
            with self.lock:
                self.busy -= 1


def new_batcher(model: GatedModel, **limits: float) -> Batcher:
    return Batcher(model.predict, model.collate, Limits(**limits))  # type: ignore[arg-type]


def enable_streams(model: GatedModel, batcher: Batcher, streams: int = 2) -> None:
    model.streams = streams
    batcher.enable_streams(model.predict, streams)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end, "waited 5 s in vain"
        time.sleep(0.001)


def hold(model: GatedModel, batcher: Batcher, pool: ThreadPoolExecutor) -> Future[np.ndarray]:
    """Shut the gate with a first request behind it."""
    model.gate.clear()
    first = pool.submit(batcher.submit, [[1]])
    until(lambda: len(model.batches) == 1)
    return first


def queue(
    batcher: Batcher, pool: ThreadPoolExecutor, requests: Sequence[Sequence[Sequence[int]]]
) -> list[Future[np.ndarray]]:
    """Let requests queue one after the other, so that their order is known."""
    futures = []
    for rows in requests:
        before = batcher.queued_rows
        futures.append(pool.submit(batcher.submit, rows))
        until(lambda before=before, rows=rows: batcher.queued_rows == before + len(rows))  # type: ignore[misc]
    return futures


class Done:
    """Keeps the requests that `Batcher.submit_nowait` reports."""

    def __init__(self) -> None:
        self.requests: list[BatchRequest] = []

    def __call__(self, request: BatchRequest) -> None:
        self.requests.append(request)

    def results(self) -> list[list[list[float]]]:
        return [request.result().tolist() for request in self.requests]
