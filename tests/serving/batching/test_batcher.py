"""The batcher, with real threads and a model that can be held at a gate."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np
import pytest

from mlflow_pt_deploy.errors import DeadlineError, OverloadedError, ServingError
from mlflow_pt_deploy.model_config import Limits
from mlflow_pt_deploy.serving.batching.batcher import Batcher
from mlflow_pt_deploy.serving.batching.request import BatchRequest, RequestContext

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


@pytest.fixture
def model() -> GatedModel:
    return GatedModel()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(32) as executor:
        yield executor


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


def test_a_lone_request_is_computed_immediately_and_in_order(model: GatedModel) -> None:
    rows = [[5] * 3, [6], [7] * 9]
    answer = new_batcher(model, max_wait_ms=0).submit(rows)
    assert answer.dtype == np.float32
    assert answer.tolist() == [[5, 3], [6, 1], [7, 9]]


def test_an_idle_model_does_not_wait(model: GatedModel) -> None:
    batcher = new_batcher(model)
    start = time.perf_counter()
    for _ in range(100):
        batcher.submit([[1]])
    assert time.perf_counter() - start < 0.5
    assert all(len(batch) == 1 for batch in model.batches)


def test_max_wait_waits_for_more_rows(model: GatedModel, pool: ThreadPoolExecutor) -> None:
    batcher = new_batcher(model, max_wait_ms=5000, max_batch_rows=3)
    start = time.perf_counter()
    wait([pool.submit(batcher.submit, [[n]]) for n in (1, 2, 3)])
    assert time.perf_counter() - start < 2, "a full batch waits no longer"
    assert sorted(map(len, model.batches)) == [3]


def test_requests_that_arrive_meanwhile_share_the_next_batch(
    model: GatedModel, pool: ThreadPoolExecutor
) -> None:
    batcher = new_batcher(model)
    first = hold(model, batcher, pool)
    others = queue(batcher, pool, [[[n, n]] for n in range(2, 10)])
    model.gate.set()
    assert first.result().tolist() == [[1, 1]]
    assert [future.result().tolist() for future in others] == [[[n, 2]] for n in range(2, 10)]
    assert list(map(len, model.batches)) == [1, 8]


def test_batches_keep_to_rows_and_padded_tokens(
    model: GatedModel, pool: ThreadPoolExecutor
) -> None:
    batcher = new_batcher(model, max_batch_rows=4, max_batch_tokens=40)
    first = hold(model, batcher, pool)
    others = queue(batcher, pool, [[[n + 1] * (1 + n % 20)] for n in range(25)])
    model.gate.set()
    wait([first, *others])
    for batch in model.batches:
        assert len(batch) <= 4
        assert len(batch) == 1 or len(batch) * max(map(len, batch)) <= 40


def test_a_row_longer_than_the_limit_is_computed_alone(model: GatedModel) -> None:
    answer = new_batcher(model, max_batch_tokens=10).submit([[1] * 50, [2], [3]])
    assert answer[:, 1].tolist() == [50, 1, 1]
    assert sorted(map(len, model.batches)) == [1, 2]


def test_rows_of_very_different_length_do_not_share_padding(
    model: GatedModel, pool: ThreadPoolExecutor
) -> None:
    batcher = new_batcher(model)
    first = hold(model, batcher, pool)
    others = queue(batcher, pool, [[[2] * 500], *([[3] * 5] for _ in range(10)), [[4] * 490]])
    model.gate.set()
    wait([first, *others])
    assert [sorted({len(row) for row in batch}) for batch in model.batches[1:]] == [[490, 500], [5]]


@pytest.mark.parametrize(("call_s", "together"), [(0.0, False), (1e-3, True)])
def test_padding_is_accepted_where_a_call_costs_more(
    call_s: float,
    together: bool,
    model: GatedModel,
    pool: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batcher = new_batcher(model)
    first = hold(model, batcher, pool)
    for tokens in (5, 20, 50, 5, 20, 50):  # 0.1 ms a token, observed before
        batcher.executor._token_latency.observe(tokens, call_s + 1e-4 * tokens)
    monkeypatch.setattr(
        batcher.executor._token_latency, "observe", lambda *_: None
    )  # nor the one that is held
    others = queue(batcher, pool, [[[2] * 9], [[3] * 5]])
    model.gate.set()
    wait([first, *others])
    assert len(model.batches) == (2 if together else 3)


def test_the_oldest_request_is_always_in_the_next_batch(
    model: GatedModel, pool: ThreadPoolExecutor
) -> None:
    batcher = new_batcher(model, max_batch_rows=2)
    first = hold(model, batcher, pool)
    others = queue(batcher, pool, [[[2] * 400], *([[3] * 5] for _ in range(10))])
    model.gate.set()
    wait([first, *others])
    assert len(model.batches[1][0]) == 400


def test_a_large_request_takes_turns_with_small_ones(
    model: GatedModel, pool: ThreadPoolExecutor
) -> None:
    batcher = new_batcher(model, max_batch_rows=4)
    first = hold(model, batcher, pool)
    large, small = queue(batcher, pool, [[[2]] * 40, [[3] * 300]])
    model.gate.set()
    wait([first, large, small])
    assert large.result().shape == (40, 2)
    assert model.batches[2] == [[3] * 300], "after one chunk of the large one, not after ten"


def test_a_full_queue_rejects_and_recovers(model: GatedModel, pool: ThreadPoolExecutor) -> None:
    batcher = new_batcher(model, queue_rows=3)
    first = hold(model, batcher, pool)
    waiting = queue(batcher, pool, [[[2], [3]]])
    with pytest.raises(
        OverloadedError, match=r"holds 2 rows and 2 more do not fit \(queue_rows is 3\)"
    ):
        batcher.submit([[4], [5]])
    model.gate.set()
    wait([first, *waiting])
    assert batcher.submit([[4], [5], [6]]).shape == (3, 2)


def test_batch_scoring_has_no_queue_limit(model: GatedModel) -> None:
    assert new_batcher(model, queue_rows=1).submit([[1]] * 100, bounded=False).shape == (100, 2)


def test_an_expired_request_is_dropped_and_never_computed(
    model: GatedModel, pool: ThreadPoolExecutor
) -> None:
    batcher = new_batcher(model, deadline_ms=50)
    first = hold(model, batcher, pool)
    (late,) = queue(batcher, pool, [[[7]]])
    with pytest.raises(DeadlineError, match=r"50 ms \(deadline_ms\)"):
        late.result(timeout=2)
    model.gate.set()
    first.result()
    assert batcher.submit([[8]]).tolist() == [[8, 1]]
    assert [[7]] not in model.batches
    assert batcher.queued_rows == 0


def test_one_bad_row_fails_alone(model: GatedModel, pool: ThreadPoolExecutor) -> None:
    batcher = new_batcher(model)
    first = hold(model, batcher, pool)
    good = queue(batcher, pool, [[[n]] for n in (2, 3, 4)])
    bad = queue(batcher, pool, [[[BAD], [9]]])
    good += queue(batcher, pool, [[[n]] for n in (5, 6, 7)])
    model.gate.set()
    with pytest.raises(ValueError, match="bad row"):
        bad[0].result()
    assert [int(f.result()[0, 0]) for f in good] == [2, 3, 4, 5, 6, 7]
    assert first.result().tolist() == [[1, 1]]
    assert batcher.submit([[1]]).tolist() == [[1, 1]], "the model is free again"


@pytest.mark.parametrize(("bad", "calls"), [(1, 9), (16, 31)])
def test_bisection_takes_a_bounded_number_of_calls(model: GatedModel, bad: int, calls: int) -> None:
    rows = [[n] for n in range(1, 17 - bad)] + [[BAD]] * bad
    with pytest.raises(ValueError, match="bad row"):
        new_batcher(model).submit(rows)
    assert len(model.batches) <= calls


def test_the_same_row_is_computed_once_in_a_batch_and_while_in_flight(
    model: GatedModel, pool: ThreadPoolExecutor
) -> None:
    batcher = new_batcher(model)
    model.gate.clear()
    first = pool.submit(batcher.submit, [[1]], dedup_keys=["one"])
    until(lambda: len(model.batches) == 1)
    joined = [pool.submit(batcher.submit, [[1], [1]], dedup_keys=["one", "one"]) for _ in range(3)]
    mixed = pool.submit(batcher.submit, [[2], [1], [2]], dedup_keys=["two", "one", "two"])
    more = pool.submit(batcher.submit, [[2]], dedup_keys=["two"])
    until(lambda: batcher.queued_rows == 3 and len(batcher._running[0]["one"]) == 8)
    model.gate.set()
    assert first.result().tolist() == [[1, 1]]
    for future in joined:
        assert future.result().tolist() == [[1, 1], [1, 1]]
    assert mixed.result().tolist() == [[2, 1], [1, 1], [2, 1]]
    assert more.result().tolist() == [[2, 1]]
    assert model.batches == [[[1]], [[2]]]
    assert batcher.submit([[1]], dedup_keys=["one"]).tolist() == [[1, 1]], "answers are not kept"
    assert len(model.batches) == 3


def test_requests_that_share_a_failing_row_share_its_failure(
    model: GatedModel, pool: ThreadPoolExecutor
) -> None:
    batcher = new_batcher(model)
    model.gate.clear()
    first = pool.submit(batcher.submit, [[BAD]], dedup_keys=["bad"])
    until(lambda: len(model.batches) == 1)
    second = pool.submit(batcher.submit, [[BAD]], dedup_keys=["bad"])
    until(lambda: len(batcher._running[0]["bad"]) == 2)
    model.gate.set()
    for future in (first, second):
        with pytest.raises(ValueError, match="bad row"):
            future.result(timeout=2)
    assert not batcher.concurrency.busy


def test_rows_of_disconnected_clients_are_not_computed(
    model: GatedModel, pool: ThreadPoolExecutor
) -> None:
    batcher = new_batcher(model)
    first = hold(model, batcher, pool)
    context = RequestContext()
    gone = pool.submit(batcher.submit, [[7]], context=context)
    until(lambda: batcher.queued_rows == 1)
    (stays,) = queue(batcher, pool, [[[8]]])
    context.disconnected = True
    model.gate.set()
    with pytest.raises(DeadlineError):
        gone.result(timeout=2)
    assert stays.result().tolist() == [[8, 1]]
    first.result()
    assert [[7]] not in model.batches
    assert batcher.queued_rows == 0


def test_the_clients_deadline_counts_where_it_is_earlier(
    model: GatedModel, pool: ThreadPoolExecutor
) -> None:
    batcher = new_batcher(model, deadline_ms=60_000)
    first = hold(model, batcher, pool)
    context = RequestContext(expires_at=time.monotonic() + 0.05)
    late = pool.submit(batcher.submit, [[7]], context=context, bounded=False)
    with pytest.raises(DeadlineError, match="the request's own deadline"):
        late.result(timeout=2)
    model.gate.set()
    first.result()
    assert [[7]] not in model.batches


def test_each_call_of_the_model_is_observed(model: GatedModel) -> None:
    batcher = new_batcher(model)
    done: list[tuple[int, int, int, float]] = []
    batcher.executor.on_call = lambda *numbers: done.append(numbers)
    batcher.submit([[5] * 3, [6], [7] * 2])
    assert [numbers[:3] for numbers in done] == [(3, 6, 9)]
    assert 0 < done[0][3] < 1


def test_other_requests_are_computed_if_a_caller_is_interrupted(
    model: GatedModel, pool: ThreadPoolExecutor
) -> None:
    def interrupted(inputs: dict[str, np.ndarray]) -> np.ndarray:
        if len(model.batches) == 0:
            model.predict(inputs)
            raise KeyboardInterrupt
        return model.predict(inputs)

    batcher = Batcher(interrupted, model.collate)  # type: ignore[arg-type]
    first = hold(model, batcher, pool)
    (second,) = queue(batcher, pool, [[[2]]])
    model.gate.set()
    with pytest.raises(KeyboardInterrupt):
        first.result()
    assert second.result(timeout=2).tolist() == [[2, 1]]


def test_a_model_that_loses_rows_is_an_error() -> None:
    batcher = Batcher(lambda inputs: np.zeros((0, 2), np.float32), lambda rows: {})
    with pytest.raises(ServingError, match="returned 0 rows for 1"):
        batcher.submit([[1]])


def test_a_request_of_no_rows_is_refused(model: GatedModel) -> None:
    with pytest.raises(ServingError, match="without rows"):
        new_batcher(model).submit([])


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


def test_where_padding_costs_nothing_lengths_do_not_matter(model: GatedModel) -> None:
    done: list[tuple[int, int, int]] = []
    batcher = Batcher(model.predict, model.collate, Limits(max_batch_tokens=1000), pads=False)
    batcher.executor.on_call = lambda rows, tokens, padded, _: done.append((rows, tokens, padded))
    batcher.submit([[1], [2] * 300, [3] * 200])
    batcher.submit([[1] * 600, [2] * 600])
    assert done == [(3, 501, 501), (1, 600, 600), (1, 600, 600)]


class Done:
    """Keeps the requests that `Batcher.submit_nowait` reports."""

    def __init__(self) -> None:
        self.requests: list[BatchRequest] = []

    def __call__(self, request: BatchRequest) -> None:
        self.requests.append(request)

    def results(self) -> list[list[list[float]]]:
        return [request.result().tolist() for request in self.requests]


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
        with pytest.raises(OverloadedError, match="gives no thread to compute on"):
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
