"""The batcher's calls that do not block: `submit_nowait` and `try_run_inline`."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from tiny.batching import BAD, Done, GatedModel, hold, new_batcher, queue, until

from mlflow_pt_deploy.errors import OverloadedError
from mlflow_pt_deploy.serving.batching.request import RequestContext


def test_submit_nowait_reports_each_request_when_it_is_done(model: GatedModel) -> None:
    before = set(threading.enumerate())
    batcher, done = new_batcher(model), Done()
    model.gate.clear()
    started = [batcher.submit_nowait([[n], [n, n]], done) for n in range(1, 9)]
    assert not done.requests
    model.gate.set()
    until(lambda: len(done.requests) == 8 and not batcher.concurrency.busy)
    assert sorted(done.results()) == [[[n, 1], [n, 2]] for n in range(1, 9)]
    assert set(started) == set(done.requests)
    assert len(model.batches) == 2  # the first alone, all that arrived meanwhile together
    new = set(threading.enumerate()) - before
    assert len([thread for thread in new if "batcher" in thread.name]) == 1


def test_blocking_and_nonblocking_requests_share_one_queue(
    model: GatedModel, pool: ThreadPoolExecutor
) -> None:
    batcher, done = new_batcher(model, max_batch_rows=2), Done()
    first = hold(model, batcher, pool)
    others = []
    for n in range(2, 12, 2):
        batcher.submit_nowait([[n]], done)
        others += queue(batcher, pool, [[[n + 1]]])
    model.gate.set()
    assert [future.result().tolist() for future in [first, *others]] == [
        [[n, 1]] for n in range(1, 12, 2)
    ]
    until(lambda: len(done.requests) == 5 and not batcher.concurrency.busy)
    assert sorted(done.results()) == [[[n, 1]] for n in range(2, 12, 2)]


def test_one_bad_row_fails_alone_without_blocking(model: GatedModel) -> None:
    batcher, done = new_batcher(model), Done()
    model.gate.clear()
    for n in (1, 2, BAD, 3):
        batcher.submit_nowait([[n]], done)
    model.gate.set()
    until(lambda: len(done.requests) == 4)
    failed = [request for request in done.requests if request.error]
    assert [request.rows for request in failed] == [[[BAD]]]


def test_an_equal_row_is_reported_to_every_request(model: GatedModel) -> None:
    batcher, done = new_batcher(model), Done()
    model.gate.clear()
    batcher.submit_nowait([[1]], done, dedup_keys=["a"])
    until(lambda: len(model.batches) == 1)
    for _ in range(3):
        batcher.submit_nowait([[1]], done, dedup_keys=["a"])  # joins what is being computed
    model.gate.set()
    until(lambda: len(done.requests) == 4)
    assert done.results() == [[[1, 1]]] * 4
    assert len(model.batches) == 1


def test_queued_rows_of_disconnected_clients_are_dropped_without_blocking(
    model: GatedModel,
) -> None:
    batcher, done, gone = new_batcher(model), Done(), RequestContext()
    model.gate.clear()
    batcher.submit_nowait([[1]], done)
    until(lambda: len(model.batches) == 1)
    batcher.submit_nowait([[2]], done, context=gone)
    gone.disconnected = True
    model.gate.set()
    until(lambda: len(done.requests) == 2)
    assert model.batches == [[[1]]]


def test_a_full_queue_rejects_without_blocking(model: GatedModel) -> None:
    batcher, done = new_batcher(model, queue_rows=1), Done()
    model.gate.clear()
    batcher.submit_nowait([[1]], done)
    until(lambda: len(model.batches) == 1)
    batcher.submit_nowait([[2]], done)
    with pytest.raises(OverloadedError, match="queue_rows is 1"):
        batcher.submit_nowait([[3]], done)
    model.gate.set()
    until(lambda: len(done.requests) == 2)


def test_a_request_that_would_miss_its_deadline_is_rejected_immediately(model: GatedModel) -> None:
    batcher, done = new_batcher(model, deadline_ms=1400), Done()
    for rows in (1, 2, 3):  # 0.2 s a row, observed before
        batcher.executor._row_latency.observe(rows, 0.2 * rows)
    model.gate.clear()
    batcher.submit_nowait([[1]], done)
    until(lambda: len(model.batches) == 1)
    for n in (2, 3, 4):
        batcher.submit_nowait([[n]], done)
    start = time.perf_counter()
    with pytest.raises(OverloadedError, match="estimated wait 600 ms"):
        batcher.submit_nowait([[5]], done)
    assert time.perf_counter() - start < 0.1
    model.gate.set()
    until(lambda: len(done.requests) == 4)


def test_rows_are_computed_inline_if_the_model_is_idle(
    model: GatedModel, pool: ThreadPoolExecutor
) -> None:
    batcher = new_batcher(model, max_batch_rows=3)
    rows = [[7], [8, 8], [7]]
    answers = batcher.try_run_inline(rows, dedup_keys=["a", "b", "a"])
    assert answers is not None
    assert answers.tolist() == [[7, 1], [8, 2], [7, 1]]
    assert model.batches == [[[7], [8, 8]]]
    assert batcher.try_run_inline([[1]] * 4) is None, "more than a batch holds"
    assert batcher.try_run_inline([[1], [2] * 200]) is None, "too much padding"
    with pytest.raises(ValueError, match="bad row"):
        batcher.try_run_inline([[BAD]])
    assert not batcher.concurrency.busy
    model.batches.clear()
    held = hold(model, batcher, pool)
    assert batcher.try_run_inline([[1]]) is None, "somebody else computes"
    model.gate.set()
    assert held.result(10).tolist()


def test_a_request_that_arrives_during_an_inline_batch_is_next(
    model: GatedModel, pool: ThreadPoolExecutor
) -> None:
    batcher = new_batcher(model)
    model.gate.clear()
    first = pool.submit(batcher.try_run_inline, [[1]])
    until(lambda: batcher.concurrency.busy)
    second = pool.submit(batcher.submit, [[2]])
    until(lambda: batcher.queued_rows == 1)
    model.gate.set()
    found = first.result(10)
    assert found is not None
    assert found.tolist() == [[1, 1]]
    assert second.result(10).tolist() == [[2, 1]]
    assert not batcher.concurrency.busy
