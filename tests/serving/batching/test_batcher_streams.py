"""The batcher with several batches at a time, and without threads to run them on."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import pytest
from tiny.batching import BAD, Done, GatedModel, enable_streams, hold, new_batcher, queue, until

from mlflow_pt_deploy.errors import OverloadedError
from mlflow_pt_deploy.serving.batching.batcher import Batcher


def test_two_batches_are_computed_at_a_time(model: GatedModel, pool: ThreadPoolExecutor) -> None:
    batcher = new_batcher(model)
    enable_streams(model, batcher)
    first = hold(model, batcher, pool)
    assert not batcher.concurrency.saturated
    second = pool.submit(batcher.submit, [[2, 2]])
    until(lambda: len(model.batches) == 2)
    assert batcher.concurrency.saturated
    others = queue(batcher, pool, [[[n] * 3] for n in range(3, 9)])
    assert len(model.batches) == 2, "both threads compute"
    model.gate.set()
    assert first.result(5).tolist() == [[1, 1]]
    assert second.result(5).tolist() == [[2, 2]]
    assert [future.result(5).tolist() for future in others] == [[[n, 3]] for n in range(3, 9)]
    assert sorted(map(len, model.batches)) == [1, 1, 1, 2, 3], "half of the queued rows"
    until(lambda: not batcher.concurrency.busy)
    assert not batcher.concurrency.saturated


def test_without_streams_a_running_model_is_not_saturated(
    model: GatedModel, pool: ThreadPoolExecutor
) -> None:
    batcher = new_batcher(model)
    first = hold(model, batcher, pool)
    assert batcher.concurrency.busy
    assert not batcher.concurrency.saturated  # a new request can still be in the next batch
    model.gate.set()
    first.result(5)


def test_nonblocking_requests_are_computed_two_at_a_time(model: GatedModel) -> None:
    batcher, done = new_batcher(model), Done()
    enable_streams(model, batcher)
    model.gate.clear()
    for n in (1, 2, 3):
        batcher.submit_nowait([[n]], done)
    until(lambda: len(model.batches) == 2)
    assert batcher.queued_rows == 1
    model.gate.set()
    until(lambda: len(done.requests) == 3 and not batcher.concurrency.busy)
    assert sorted(done.results()) == [[[n, 1]] for n in (1, 2, 3)]


def test_one_request_is_computed_by_all_threads(model: GatedModel) -> None:
    model.streams = 2
    batcher = new_batcher(model)
    threads: set[int] = set()
    met = threading.Barrier(2)

    def single(inputs: dict[str, np.ndarray]) -> np.ndarray:
        if threading.get_ident() not in threads:
            threads.add(threading.get_ident())
            met.wait(5)  # in vain, if one thread computed both halves
        return model.predict(inputs)

    batcher.enable_streams(single, 2)  # type: ignore[arg-type]
    rows = [[n, n] for n in range(1, 9)]
    assert batcher.submit(rows).tolist() == [[n, 2] for n in range(1, 9)]
    assert len(threads) == 2
    assert sorted(map(len, model.batches)) == [4, 4]


def test_batches_of_one_thread_are_small_and_alike(
    model: GatedModel, pool: ThreadPoolExecutor
) -> None:
    batcher = new_batcher(model)
    enable_streams(model, batcher)
    model.gate.clear()
    held = [pool.submit(batcher.submit, [[n]]) for n in (1, 2)]
    until(lambda: len(model.batches) == 2)
    lengths = [5, 30, 6, 31, 5, 7] * 10
    others = queue(batcher, pool, [[[9] * length] for length in lengths[:20]])
    done = Done()
    started = [batcher.submit_nowait([[9] * length], done) for length in lengths[20:]]
    model.gate.set()
    wait([*held, *others])
    until(lambda: len(done.requests) == len(started))
    for batch in model.batches:
        assert len(batch) <= 16
        assert max(map(len, batch)) - min(map(len, batch)) <= 2
    assert len(model.batches) <= 2 + 8


def test_a_sole_row_is_computed_with_all_threads(
    model: GatedModel, pool: ThreadPoolExecutor
) -> None:
    asked: list[str] = []

    def of(name: str) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
        def predict(inputs: dict[str, np.ndarray]) -> np.ndarray:
            asked.append(name)
            return model.predict(inputs)

        return predict

    model.streams = 2
    batcher = Batcher(of("whole"), model.collate)  # type: ignore[arg-type]
    batcher.enable_streams(of("single"), 2)  # type: ignore[arg-type]
    batcher.submit([[1]])
    batcher.submit([[1], [2]])
    assert asked == ["whole", "single", "single"]
    until(lambda: not batcher.concurrency.busy)  # answers come before their thread goes
    asked.clear()
    model.gate.clear()
    both = [pool.submit(batcher.submit, [[1]])]
    until(lambda: len(asked) == 1)
    both.append(pool.submit(batcher.submit, [[2]]))
    until(lambda: len(asked) == 2)
    assert asked == ["whole", "single"]
    assert batcher.executor.running_s > 0
    model.gate.set()
    wait(both)
    assert batcher.executor.running_s == 0


def test_an_equal_row_is_found_in_any_running_batch(
    model: GatedModel, pool: ThreadPoolExecutor
) -> None:
    batcher = new_batcher(model)
    enable_streams(model, batcher)
    model.gate.clear()
    first = [pool.submit(batcher.submit, [[n]], dedup_keys=[n]) for n in (1, 2)]
    until(lambda: len(model.batches) == 2)
    again = pool.submit(batcher.submit, [[2], [1], [2]], dedup_keys=[2, 1, 2])
    until(lambda: sum(len(rows) for batch in batcher._running for rows in batch.values()) == 5)
    model.gate.set()
    wait(first)
    assert again.result(5).tolist() == [[2, 1], [1, 1], [2, 1]]
    assert len(model.batches) == 2


def test_a_batch_that_fails_leaves_the_other_threads_alone(
    model: GatedModel, pool: ThreadPoolExecutor
) -> None:
    batcher = new_batcher(model)
    enable_streams(model, batcher)
    model.gate.clear()
    good, bad = (pool.submit(batcher.submit, [[n]]) for n in (1, BAD))
    until(lambda: len(model.batches) == 2)
    model.gate.set()
    assert good.result(5).tolist() == [[1, 1]]
    with pytest.raises(ValueError, match="bad row"):
        bad.result(5)
    until(lambda: not batcher.concurrency.busy)
    assert batcher.submit([[3]]).tolist() == [[3, 1]]


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """No threads for the batcher until the patch is undone, as where a container has a limit."""
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("batcher"):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    return monkeypatch


def test_without_a_thread_a_request_is_rejected_and_the_next_is_not(
    model: GatedModel, no_threads: pytest.MonkeyPatch
) -> None:
    batcher, done = new_batcher(model), Done()
    for _ in range(2):
        with pytest.raises(OverloadedError, match="no thread can be started"):
            batcher.submit_nowait([[1]], done)
    assert not (batcher.concurrency.busy or batcher.queued_rows)
    no_threads.undo()
    batcher.submit_nowait([[2]], done)
    until(lambda: not batcher.concurrency.busy)
    assert done.results() == [[[2, 1]]]
    assert model.batches == [[[2]]]


def test_without_a_second_thread_the_first_computes_everything(
    model: GatedModel, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    batcher, done = new_batcher(model), Done()
    enable_streams(model, batcher)
    model.gate.clear()
    batcher.submit_nowait([[1]], done)
    until(lambda: len(model.batches) == 1)
    request.getfixturevalue("no_threads")
    for n in range(2, 5):
        batcher.submit_nowait([[n]], done)
    model.gate.set()
    until(lambda: len(done.requests) == 4)
    until(lambda: not batcher.concurrency.busy)
    monkeypatch.undo()
    batcher.submit_nowait([[5]], done)
    batcher.submit_nowait([[6]], done)
    until(lambda: len(done.requests) == 6 and not batcher.concurrency.busy)
    assert sorted(done.results()) == [[[n, 1]] for n in range(1, 7)]


def test_a_request_left_without_a_thread_runs_with_the_next(
    model: GatedModel, pool: ThreadPoolExecutor, no_threads: pytest.MonkeyPatch
) -> None:
    batcher = new_batcher(model)
    first = hold(model, batcher, pool)
    (second,) = queue(batcher, pool, [[[2]]])
    model.gate.set()
    assert first.result().tolist() == [[1, 1]]
    until(lambda: not batcher.concurrency.busy)
    assert batcher.queued_rows == 1
    assert batcher.submit([[3]]).tolist() == [[3, 1]]
    assert second.result().tolist() == [[2, 1]]
    assert not (batcher.concurrency.busy or batcher.queued_rows)


@pytest.mark.parametrize("streams", [1, 3])
def test_no_request_is_lost_or_mixed_up_under_load(
    model: GatedModel, pool: ThreadPoolExecutor, streams: int
) -> None:
    batcher = new_batcher(model, max_batch_rows=8, queue_rows=100_000)
    if streams > 1:
        enable_streams(model, batcher, streams)

    def client(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(40):
            sizes = random.integers(1, 30, size=random.integers(1, 12))
            rows = [[seed + 1] * int(size) for size in sizes]
            assert batcher.submit(rows).tolist() == [[seed + 1, len(row)] for row in rows]

    for future in [pool.submit(client, seed) for seed in range(32)]:
        future.result(timeout=20)
    assert batcher.queued_rows == 0
    until(lambda: not batcher.concurrency.busy)


def test_a_model_that_takes_concurrent_calls_keeps_the_size_of_its_batches(
    model: GatedModel, pool: ThreadPoolExecutor
) -> None:
    model.streams = 2
    batcher = new_batcher(model, max_batch_rows=32)
    batcher.allow_concurrent_calls(2)
    first = hold(model, batcher, pool)
    second = pool.submit(batcher.submit, [[n + 2] for n in range(60)])
    until(lambda: model.busy == 2)
    model.gate.set()
    assert first.result().tolist() == [[1, 1]] and len(second.result()) == 60
    assert [len(batch) for batch in model.batches] == [1, 30, 30]
