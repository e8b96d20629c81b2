"""Admission control: what is rejected, and the estimate of a request's cost on the event loop."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from mlflow_pt_deploy.model_config import Limits
from mlflow_pt_deploy.serving.batching import admission as module
from mlflow_pt_deploy.serving.batching.admission import (
    LOOP_SHARE,
    QUEUE_SHARE,
    STREAM_QUEUE_SHARE,
    AdmissionController,
    LoopIterationEstimator,
)
from mlflow_pt_deploy.serving.batching.batcher import Batcher

REQUEST_S = 70e-6


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 1.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def controller(queued: int = 0, wait_s: float = 0.0, **limits: float) -> AdmissionController:
    return AdmissionController(Limits(**limits), lambda: queued, lambda: wait_s)  # type: ignore[arg-type]


def test_an_idle_model_admits_any_deadline() -> None:
    assert controller().rejection(0.0) == ""
    assert controller(wait_s=9.0).rejection(0.001) == "", "the wait counts only behind queued rows"


def test_a_request_without_a_deadline_is_admitted_until_the_queue_is_full() -> None:
    assert controller(queued=1000, wait_s=60.0).rejection(None) == ""
    assert controller(queued=1000, wait_s=60.0).rejection(None, rows=24) == ""
    full = controller(queued=1000).rejection(None, rows=25)
    assert "the queue holds 1000 rows and 25 more do not fit (queue_rows is 1024)" in full


def test_the_estimated_wait_may_be_a_share_of_the_deadline() -> None:
    wait_s = 0.1
    assert controller(5, wait_s).rejection(1.01 * wait_s / QUEUE_SHARE) == ""
    reason = controller(5, wait_s).rejection(0.99 * wait_s / QUEUE_SHARE)
    assert reason.startswith("server overloaded: estimated wait 100 ms is too long for the request")
    streams = controller(5, wait_s)
    streams.queue_share = STREAM_QUEUE_SHARE
    assert streams.rejection(1.01 * wait_s / QUEUE_SHARE)


def test_the_wait_on_the_event_loop_counts_too() -> None:
    assert controller().rejection(1.0, loop_wait_s=0.99 * LOOP_SHARE) == ""
    assert "server overloaded" in controller().rejection(1.0, loop_wait_s=1.01 * LOOP_SHARE)
    assert controller(1, 0.3).rejection(1.0) == ""
    assert controller(1, 0.3).rejection(1.0, loop_wait_s=0.05), "the sum is over the queue's share"


@pytest.mark.parametrize(("streams", "share"), [(1, QUEUE_SHARE), (2, STREAM_QUEUE_SHARE)])
def test_streams_halve_the_estimated_wait(streams: int, share: float) -> None:
    gate = threading.Event()

    def predict(inputs: dict[str, np.ndarray]) -> np.ndarray:
        assert gate.wait(10)
        return np.zeros((len(inputs["ids"]), 2), np.float32)

    batcher = Batcher(predict, lambda rows: {"ids": np.array(rows)}, Limits())  # type: ignore[arg-type]
    if streams > 1:
        batcher.enable_streams(predict, streams)  # type: ignore[arg-type]
    for rows in (1, 4, 16, 1, 4, 16):
        batcher.executor._row_latency.observe(rows, rows * 1e-3)
    done: list[object] = []
    for number in range(streams):
        batcher.submit_nowait([[number]], done.append)
    while batcher.queued_rows:
        pass
    for number in range(40):
        batcher.submit_nowait([[100 + number]], done.append)
    deadline_s = 0.040 / streams / share
    assert batcher.admission.rejection(1.1 * deadline_s) == ""
    assert batcher.admission.rejection(0.9 * deadline_s)
    gate.set()
    while len(done) < 40 + streams:
        pass


def test_the_cost_of_a_request_on_the_loop_is_estimated(clock: Clock) -> None:
    estimator = LoopIterationEstimator()
    for _ in range(4):
        assert estimator.request_s == 0.0 or estimator.request_s == pytest.approx(2 * REQUEST_S)
        estimator.begin_iteration()
        clock.now += 100 * REQUEST_S
        estimator.end_iteration(100)
    assert estimator.request_s == pytest.approx(2 * REQUEST_S)


def test_a_pause_of_the_machine_does_not_raise_the_estimate(clock: Clock) -> None:
    estimator = LoopIterationEstimator()
    for iteration in range(100):
        estimator.begin_iteration()
        clock.now += 100 * REQUEST_S + (0.05 if iteration % 5 == 0 else 0.0)
        estimator.end_iteration(100)
    assert estimator.request_s == pytest.approx(2 * REQUEST_S)


def test_iterations_of_few_requests_are_not_sampled(clock: Clock) -> None:
    estimator = LoopIterationEstimator()
    for _ in range(100):
        estimator.begin_iteration()
        clock.now += 0.01  # the loop mostly waits
        estimator.end_iteration(15)
    assert estimator.request_s == 0.0


def test_idle_time_between_bursts_does_not_count(clock: Clock) -> None:
    estimator = LoopIterationEstimator()
    for _ in range(10):
        clock.now += 5.0
        estimator.begin_iteration()
        clock.now += 100 * REQUEST_S
        estimator.end_iteration(100)
    assert estimator.request_s == pytest.approx(2 * REQUEST_S)


def test_the_estimate_falls_again_after_load(clock: Clock) -> None:
    estimator = LoopIterationEstimator()
    for request_s in (1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 5e-5, 5e-5, 5e-5, 5e-5):
        estimator.begin_iteration()
        clock.now += 100 * request_s
        estimator.end_iteration(100)
    assert estimator.request_s == pytest.approx(1e-4)
