"""The batcher, with real threads and a model that can be held at a gate."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np
import pytest

from mlflow_pt_deploy.errors import DeadlineError, OverloadedError, ServingError
from mlflow_pt_deploy.serving.batching.batcher import Batcher
from mlflow_pt_deploy.serving.batching.request import Caller, Ticket, cut
from mlflow_pt_deploy.serving.batching.request_queue import Queue
from mlflow_pt_deploy.serving.model.options import Limits

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


def batcher(model: GatedModel, **limits: float) -> Batcher:
    return Batcher(model.predict, model.collate, Limits(**limits))  # type: ignore[arg-type]


def spread(model: GatedModel, under: Batcher, streams: int = 2) -> None:
    model.streams = streams
    under.spread(model.predict, streams)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end, "waited 5 s in vain"
        time.sleep(0.001)


def hold(model: GatedModel, under: Batcher, pool: ThreadPoolExecutor) -> Future[np.ndarray]:
    """Shut the gate with a first request behind it."""
    model.gate.clear()
    first = pool.submit(under.submit, [[1]])
    until(lambda: len(model.batches) == 1)
    return first


def queue(
    under: Batcher, pool: ThreadPoolExecutor, requests: Sequence[Sequence[Sequence[int]]]
) -> list[Future[np.ndarray]]:
    """Let requests queue one after the other, so that their order is known."""
    futures = []
    for rows in requests:
        before = under.queued_rows
        futures.append(pool.submit(under.submit, rows))
        until(lambda before=before, rows=rows: under.queued_rows == before + len(rows))  # type: ignore[misc]
    return futures


def test_a_lone_request_is_answered_at_once_and_in_its_order(model: GatedModel) -> None:
    rows = [[5] * 3, [6], [7] * 9]
    answer = batcher(model, max_wait_ms=0).submit(rows)
    assert answer.dtype == np.float32
    assert answer.tolist() == [[5, 3], [6, 1], [7, 9]]


def test_an_idle_model_does_not_wait(model: GatedModel) -> None:
    under = batcher(model)
    start = time.perf_counter()
    for _ in range(100):
        under.submit([[1]])
    assert time.perf_counter() - start < 0.5
    assert all(len(batch) == 1 for batch in model.batches)


def test_max_wait_gathers_company(model: GatedModel, pool: ThreadPoolExecutor) -> None:
    under = batcher(model, max_wait_ms=5000, max_batch_rows=3)
    start = time.perf_counter()
    wait([pool.submit(under.submit, [[n]]) for n in (1, 2, 3)])
    assert time.perf_counter() - start < 2, "a full batch waits no longer"
    assert sorted(map(len, model.batches)) == [3]


def test_who_comes_meanwhile_shares_the_next_batch(
    model: GatedModel, pool: ThreadPoolExecutor
) -> None:
    under = batcher(model)
    first = hold(model, under, pool)
    others = queue(under, pool, [[[n, n]] for n in range(2, 10)])
    model.gate.set()
    assert first.result().tolist() == [[1, 1]]
    assert [future.result().tolist() for future in others] == [[[n, 2]] for n in range(2, 10)]
    assert list(map(len, model.batches)) == [1, 8]


def test_batches_keep_to_rows_and_padded_tokens(
    model: GatedModel, pool: ThreadPoolExecutor
) -> None:
    under = batcher(model, max_batch_rows=4, max_batch_tokens=40)
    first = hold(model, under, pool)
    others = queue(under, pool, [[[n + 1] * (1 + n % 20)] for n in range(25)])
    model.gate.set()
    wait([first, *others])
    for batch in model.batches:
        assert len(batch) <= 4
        assert len(batch) == 1 or len(batch) * max(map(len, batch)) <= 40


def test_a_row_longer_than_the_limit_is_computed_alone(model: GatedModel) -> None:
    answer = batcher(model, max_batch_tokens=10).submit([[1] * 50, [2], [3]])
    assert answer[:, 1].tolist() == [50, 1, 1]
    assert sorted(map(len, model.batches)) == [1, 2]


def test_rows_of_very_different_length_do_not_share_padding(
    model: GatedModel, pool: ThreadPoolExecutor
) -> None:
    under = batcher(model)
    first = hold(model, under, pool)
    others = queue(under, pool, [[[2] * 500], *([[3] * 5] for _ in range(10)), [[4] * 490]])
    model.gate.set()
    wait([first, *others])
    assert [sorted({len(row) for row in batch}) for batch in model.batches[1:]] == [[490, 500], [5]]


@pytest.mark.parametrize(("call_s", "together"), [(0.0, False), (1e-3, True)])
def test_padding_is_shared_where_a_call_costs_more(
    call_s: float,
    together: bool,
    model: GatedModel,
    pool: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    under = batcher(model)
    first = hold(model, under, pool)
    for tokens in (5, 20, 50, 5, 20, 50):  # 0.1 ms a token, as seen of late
        under.executor._token_cost.saw(tokens, call_s + 1e-4 * tokens)
    monkeypatch.setattr(under.executor._token_cost, "saw", lambda *_: None)  # nor the one that is held
    others = queue(under, pool, [[[2] * 9], [[3] * 5]])
    model.gate.set()
    wait([first, *others])
    assert len(model.batches) == (2 if together else 3)


def test_the_oldest_is_never_overtaken_by_a_better_fit(
    model: GatedModel, pool: ThreadPoolExecutor
) -> None:
    under = batcher(model, max_batch_rows=2)
    first = hold(model, under, pool)
    others = queue(under, pool, [[[2] * 400], *([[3] * 5] for _ in range(10))])
    model.gate.set()
    wait([first, *others])
    assert len(model.batches[1][0]) == 400


def test_a_large_request_takes_turns_with_small_ones(
    model: GatedModel, pool: ThreadPoolExecutor
) -> None:
    under = batcher(model, max_batch_rows=4)
    first = hold(model, under, pool)
    large, small = queue(under, pool, [[[2]] * 40, [[3] * 300]])
    model.gate.set()
    wait([first, large, small])
    assert large.result().shape == (40, 2)
    assert model.batches[2] == [[3] * 300], "after one chunk of the large one, not after ten"


def test_a_full_queue_refuses_and_recovers(model: GatedModel, pool: ThreadPoolExecutor) -> None:
    under = batcher(model, queue_rows=3)
    first = hold(model, under, pool)
    waiting = queue(under, pool, [[[2], [3]]])
    with pytest.raises(OverloadedError, match="2 rows wait, 2 more came, queue_rows is 3"):
        under.submit([[4], [5]])
    model.gate.set()
    wait([first, *waiting])
    assert under.submit([[4], [5], [6]]).shape == (3, 2)


def test_batch_scoring_knows_no_queue_limit(model: GatedModel) -> None:
    assert batcher(model, queue_rows=1).submit([[1]] * 100, bounded=False).shape == (100, 2)


def test_a_late_request_is_given_up_and_never_computed(
    model: GatedModel, pool: ThreadPoolExecutor
) -> None:
    under = batcher(model, deadline_ms=50)
    first = hold(model, under, pool)
    (late,) = queue(under, pool, [[[7]]])
    with pytest.raises(DeadlineError, match=r"50 ms \(deadline_ms\)"):
        late.result(timeout=2)
    model.gate.set()
    first.result()
    assert under.submit([[8]]).tolist() == [[8, 1]]
    assert [[7]] not in model.batches
    assert under.queued_rows == 0


def test_one_bad_row_fails_alone(model: GatedModel, pool: ThreadPoolExecutor) -> None:
    under = batcher(model)
    first = hold(model, under, pool)
    good = queue(under, pool, [[[n]] for n in (2, 3, 4)])
    bad = queue(under, pool, [[[BAD], [9]]])
    good += queue(under, pool, [[[n]] for n in (5, 6, 7)])
    model.gate.set()
    with pytest.raises(ValueError, match="bad row"):
        bad[0].result()
    assert [int(f.result()[0, 0]) for f in good] == [2, 3, 4, 5, 6, 7]
    assert first.result().tolist() == [[1, 1]]
    assert under.submit([[1]]).tolist() == [[1, 1]], "the model is free again"


@pytest.mark.parametrize(("bad", "calls"), [(1, 9), (16, 31)])
def test_to_find_bad_rows_costs_a_bounded_number_of_calls(
    model: GatedModel, bad: int, calls: int
) -> None:
    rows = [[n] for n in range(1, 17 - bad)] + [[BAD]] * bad
    with pytest.raises(ValueError, match="bad row"):
        batcher(model).submit(rows)
    assert len(model.batches) <= calls


def test_the_same_row_is_computed_once_in_a_batch_and_while_in_flight(
    model: GatedModel, pool: ThreadPoolExecutor
) -> None:
    under = batcher(model)
    model.gate.clear()
    first = pool.submit(under.submit, [[1]], keys=["one"])
    until(lambda: len(model.batches) == 1)
    joined = [pool.submit(under.submit, [[1], [1]], keys=["one", "one"]) for _ in range(3)]
    mixed = pool.submit(under.submit, [[2], [1], [2]], keys=["two", "one", "two"])
    more = pool.submit(under.submit, [[2]], keys=["two"])
    until(lambda: under.queued_rows == 3 and len(under._computing[0]["one"]) == 8)
    model.gate.set()
    assert first.result().tolist() == [[1, 1]]
    for future in joined:
        assert future.result().tolist() == [[1, 1], [1, 1]]
    assert mixed.result().tolist() == [[2, 1], [1, 1], [2, 1]]
    assert more.result().tolist() == [[2, 1]]
    assert model.batches == [[[1]], [[2]]]
    assert under.submit([[1]], keys=["one"]).tolist() == [[1, 1]], "answers are not kept"
    assert len(model.batches) == 3


def test_who_shares_a_bad_row_shares_its_failure(
    model: GatedModel, pool: ThreadPoolExecutor
) -> None:
    under = batcher(model)
    model.gate.clear()
    first = pool.submit(under.submit, [[BAD]], keys=["bad"])
    until(lambda: len(model.batches) == 1)
    second = pool.submit(under.submit, [[BAD]], keys=["bad"])
    until(lambda: len(under._computing[0]["bad"]) == 2)
    model.gate.set()
    for future in (first, second):
        with pytest.raises(ValueError, match="bad row"):
            future.result(timeout=2)
    assert not under.workers.busy


def test_rows_of_callers_that_left_are_not_computed(
    model: GatedModel, pool: ThreadPoolExecutor
) -> None:
    under = batcher(model)
    first = hold(model, under, pool)
    caller = Caller()
    gone = pool.submit(under.submit, [[7]], caller=caller)
    until(lambda: under.queued_rows == 1)
    (stays,) = queue(under, pool, [[[8]]])
    caller.left = True
    model.gate.set()
    with pytest.raises(DeadlineError):
        gone.result(timeout=2)
    assert stays.result().tolist() == [[8, 1]]
    first.result()
    assert [[7]] not in model.batches
    assert under.queued_rows == 0


def test_a_callers_own_deadline_counts_where_it_is_earlier(
    model: GatedModel, pool: ThreadPoolExecutor
) -> None:
    under = batcher(model, deadline_ms=60_000)
    first = hold(model, under, pool)
    caller = Caller(expires=time.monotonic() + 0.05)
    late = pool.submit(under.submit, [[7]], caller=caller, bounded=False)
    with pytest.raises(DeadlineError, match="the request's own deadline"):
        late.result(timeout=2)
    model.gate.set()
    first.result()
    assert [[7]] not in model.batches


def test_each_call_of_the_model_is_told(model: GatedModel) -> None:
    under = batcher(model)
    told: list[tuple[int, int, int, float]] = []
    under.executor.on_call = lambda *numbers: told.append(numbers)
    under.submit([[5] * 3, [6], [7] * 2])
    assert [numbers[:3] for numbers in told] == [(3, 6, 9)]
    assert 0 < told[0][3] < 1


def test_others_are_computed_where_a_caller_is_interrupted(
    model: GatedModel, pool: ThreadPoolExecutor
) -> None:
    def interrupted(inputs: dict[str, np.ndarray]) -> np.ndarray:
        if len(model.batches) == 0:
            model.predict(inputs)
            raise KeyboardInterrupt
        return model.predict(inputs)

    under = Batcher(interrupted, model.collate)  # type: ignore[arg-type]
    first = hold(model, under, pool)
    (second,) = queue(under, pool, [[[2]]])
    model.gate.set()
    with pytest.raises(KeyboardInterrupt):
        first.result()
    assert second.result(timeout=2).tolist() == [[2, 1]]


def test_a_model_that_loses_rows_is_an_error() -> None:
    under = Batcher(lambda inputs: np.zeros((0, 2), np.float32), lambda rows: {})
    with pytest.raises(ServingError, match="answered 0 of 1 rows"):
        under.submit([[1]])


def test_a_request_of_no_rows_is_refused(model: GatedModel) -> None:
    with pytest.raises(ServingError, match="no rows"):
        batcher(model).submit([])


@pytest.mark.parametrize("streams", [1, 3])
def test_nobody_is_lost_or_mixed_up_under_load(
    model: GatedModel, pool: ThreadPoolExecutor, streams: int
) -> None:
    under = batcher(model, max_batch_rows=8, queue_rows=100_000)
    if streams > 1:
        spread(model, under, streams)

    def client(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(40):
            sizes = random.integers(1, 30, size=random.integers(1, 12))
            rows = [[seed + 1] * int(size) for size in sizes]
            assert under.submit(rows).tolist() == [[seed + 1, len(row)] for row in rows]

    for future in [pool.submit(client, seed) for seed in range(32)]:
        future.result(timeout=20)
    assert under.queued_rows == 0
    until(lambda: not under.workers.busy)


def test_rows_that_are_computed_at_once(model: GatedModel, pool: ThreadPoolExecutor) -> None:
    under = batcher(model, max_batch_rows=3)
    rows = [[7], [8, 8], [7]]
    answers = under.at_once(rows, keys=["a", "b", "a"])
    assert answers is not None
    assert answers.tolist() == [[7, 1], [8, 2], [7, 1]]
    assert model.batches == [[[7], [8, 8]]]
    assert under.at_once([[1]] * 4) is None, "more than a batch holds"
    assert under.at_once([[1], [2] * 200]) is None, "too much padding"
    with pytest.raises(ValueError, match="bad row"):
        under.at_once([[BAD]])
    assert not under.workers.busy
    model.batches.clear()
    held = hold(model, under, pool)
    assert under.at_once([[1]]) is None, "somebody else computes"
    model.gate.set()
    assert held.result(10).tolist()


def test_who_came_while_rows_were_computed_at_once_is_next(
    model: GatedModel, pool: ThreadPoolExecutor
) -> None:
    under = batcher(model)
    model.gate.clear()
    first = pool.submit(under.at_once, [[1]])
    until(lambda: under.workers.busy)
    second = pool.submit(under.submit, [[2]])
    until(lambda: under.queued_rows == 1)
    model.gate.set()
    found = first.result(10)
    assert found is not None
    assert found.tolist() == [[1, 1]]
    assert second.result(10).tolist() == [[2, 1]]
    assert not under.workers.busy


def test_where_padding_costs_nothing_lengths_do_not_matter(model: GatedModel) -> None:
    told: list[tuple[int, int, int]] = []
    under = Batcher(model.predict, model.collate, Limits(max_batch_tokens=1000), pads=False)
    under.executor.on_call = lambda rows, tokens, padded, _: told.append((rows, tokens, padded))
    under.submit([[1], [2] * 300, [3] * 200])
    under.submit([[1] * 600, [2] * 600])
    assert told == [(3, 501, 501), (1, 600, 600), (1, 600, 600)]


class Told:
    """Keeps the tickets that `Batcher.start` reports."""

    def __init__(self) -> None:
        self.tickets: list[Ticket] = []

    def __call__(self, ticket: Ticket) -> None:
        self.tickets.append(ticket)

    def answers(self) -> list[list[list[float]]]:
        return [ticket.result().tolist() for ticket in self.tickets]


def test_who_must_not_wait_is_told_the_end(model: GatedModel) -> None:
    under, told = batcher(model), Told()
    model.gate.clear()
    tickets = [under.start([[n], [n, n]], told) for n in range(1, 9)]
    assert not told.tickets
    model.gate.set()
    until(lambda: len(told.tickets) == 8 and not under.workers.busy)
    assert sorted(told.answers()) == [[[n, 1], [n, 2]] for n in range(1, 9)]
    assert set(tickets) == set(told.tickets)
    assert len(model.batches) == 2  # the first alone, all that came meanwhile together
    assert len({thread.name for thread in threading.enumerate() if "batcher" in thread.name}) == 1


def test_both_kinds_of_callers_wait_in_one_queue(
    model: GatedModel, pool: ThreadPoolExecutor
) -> None:
    under, told = batcher(model, max_batch_rows=2), Told()
    first = hold(model, under, pool)
    others = []
    for n in range(2, 12, 2):
        under.start([[n]], told)
        others += queue(under, pool, [[[n + 1]]])
    model.gate.set()
    assert [future.result().tolist() for future in [first, *others]] == [
        [[n, 1]] for n in range(1, 12, 2)
    ]
    until(lambda: len(told.tickets) == 5 and not under.workers.busy)
    assert sorted(told.answers()) == [[[n, 1]] for n in range(2, 12, 2)]


def test_one_bad_row_fails_alone_there_too(model: GatedModel) -> None:
    under, told = batcher(model), Told()
    model.gate.clear()
    for n in (1, 2, BAD, 3):
        under.start([[n]], told)
    model.gate.set()
    until(lambda: len(told.tickets) == 4)
    failed = [ticket for ticket in told.tickets if ticket.error]
    assert [ticket.rows for ticket in failed] == [[[BAD]]]


def test_the_same_row_is_told_to_all_who_asked(model: GatedModel) -> None:
    under, told = batcher(model), Told()
    model.gate.clear()
    under.start([[1]], told, keys=["a"])
    until(lambda: len(model.batches) == 1)
    for _ in range(3):
        under.start([[1]], told, keys=["a"])  # joins what is being computed
    model.gate.set()
    until(lambda: len(told.tickets) == 4)
    assert told.answers() == [[[1, 1]]] * 4
    assert len(model.batches) == 1


def test_rows_of_who_left_are_not_computed_there_either(model: GatedModel) -> None:
    under, told, gone = batcher(model), Told(), Caller()
    model.gate.clear()
    under.start([[1]], told)
    until(lambda: len(model.batches) == 1)
    under.start([[2]], told, caller=gone)
    gone.left = True
    model.gate.set()
    until(lambda: len(told.tickets) == 2)
    assert model.batches == [[[1]]]


def test_a_full_queue_refuses_there_too(model: GatedModel) -> None:
    under, told = batcher(model, queue_rows=1), Told()
    model.gate.clear()
    under.start([[1]], told)
    until(lambda: len(model.batches) == 1)
    under.start([[2]], told)
    with pytest.raises(OverloadedError, match="queue_rows is 1"):
        under.start([[3]], told)
    model.gate.set()
    until(lambda: len(told.tickets) == 2)


def test_who_would_come_too_late_is_refused_at_once(model: GatedModel) -> None:
    under, told = batcher(model, deadline_ms=1400), Told()
    for rows in (1, 2, 3):  # 0.2 s a row, as seen of late
        under.executor._cost.saw(rows, 0.2 * rows)
    model.gate.clear()
    under.start([[1]], told)
    until(lambda: len(model.batches) == 1)
    for n in (2, 3, 4):
        under.start([[n]], told)
    start = time.perf_counter()
    with pytest.raises(OverloadedError, match="would wait for about 600 ms"):
        under.start([[5]], told)
    assert time.perf_counter() - start < 0.1
    model.gate.set()
    until(lambda: len(told.tickets) == 4)


def test_spare_rows_are_those_before_it_is_crowded(model: GatedModel) -> None:
    ours = batcher(model)
    assert ours.spare_rows(0.1) == float("inf")
    for rows in (1, 4, 16, 1, 4, 16):
        ours.executor._cost.saw(rows, 1e-3 + rows * 1e-3)
    spare = int(ours.spare_rows(0.15))  # a third of it: 50 ms
    assert 40 <= spare <= 50
    ours._queue.rows = spare
    assert not ours.crowded(0.15)
    assert 1 <= ours.spare_rows(0.15) <= 3
    ours._queue.rows = 60
    assert ours.crowded(0.15)
    assert ours.spare_rows(0.15) == 0


def test_two_batches_are_computed_at_a_time(model: GatedModel, pool: ThreadPoolExecutor) -> None:
    under = batcher(model)
    spread(model, under)
    first = hold(model, under, pool)
    assert not under.workers.full
    second = pool.submit(under.submit, [[2, 2]])
    until(lambda: len(model.batches) == 2)
    assert under.workers.full
    others = queue(under, pool, [[[n] * 3] for n in range(3, 9)])
    assert len(model.batches) == 2, "both threads compute"
    model.gate.set()
    assert first.result(5).tolist() == [[1, 1]]
    assert second.result(5).tolist() == [[2, 2]]
    assert [future.result(5).tolist() for future in others] == [[[n, 3]] for n in range(3, 9)]
    assert sorted(map(len, model.batches)) == [1, 1, 1, 2, 3], "half of those who wait"
    until(lambda: not under.workers.busy)
    assert not under.workers.full


def test_without_streams_a_model_that_computes_is_not_full(
    model: GatedModel, pool: ThreadPoolExecutor
) -> None:
    under = batcher(model)
    first = hold(model, under, pool)
    assert under.workers.busy
    assert not under.workers.full  # who comes now can still be in the next batch
    model.gate.set()
    first.result(5)


def test_event_loops_requests_are_computed_two_at_a_time(model: GatedModel) -> None:
    under, told = batcher(model), Told()
    spread(model, under)
    model.gate.clear()
    for n in (1, 2, 3):
        under.start([[n]], told)
    until(lambda: len(model.batches) == 2)
    assert under.queued_rows == 1
    model.gate.set()
    until(lambda: len(told.tickets) == 3 and not under.workers.busy)
    assert sorted(told.answers()) == [[[n, 1]] for n in (1, 2, 3)]


def test_one_request_is_computed_by_all_threads(model: GatedModel) -> None:
    model.streams = 2
    under = batcher(model)
    threads: set[int] = set()
    met = threading.Barrier(2)

    def single(inputs: dict[str, np.ndarray]) -> np.ndarray:
        if threading.get_ident() not in threads:
            threads.add(threading.get_ident())
            met.wait(5)  # in vain, if one thread computed both halves
        return model.predict(inputs)

    under.spread(single, 2)  # type: ignore[arg-type]
    rows = [[n, n] for n in range(1, 9)]
    assert under.submit(rows).tolist() == [[n, 2] for n in range(1, 9)]
    assert len(threads) == 2
    assert sorted(map(len, model.batches)) == [4, 4]


def test_batches_of_one_thread_are_small_and_alike(
    model: GatedModel, pool: ThreadPoolExecutor
) -> None:
    under = batcher(model)
    spread(model, under)
    model.gate.clear()
    held = [pool.submit(under.submit, [[n]]) for n in (1, 2)]
    until(lambda: len(model.batches) == 2)
    lengths = [5, 30, 6, 31, 5, 7] * 10
    others = queue(under, pool, [[[9] * length] for length in lengths[:20]])
    told = Told()
    tickets = [under.start([[9] * length], told) for length in lengths[20:]]
    model.gate.set()
    wait([*held, *others])
    until(lambda: len(told.tickets) == len(tickets))
    for batch in model.batches:
        assert len(batch) <= 16
        assert max(map(len, batch)) - min(map(len, batch)) <= 2
    assert len(model.batches) <= 2 + 8


def test_all_threads_are_for_a_row_that_comes_alone(
    model: GatedModel, pool: ThreadPoolExecutor
) -> None:
    asked: list[str] = []

    def of(name: str) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
        def predict(inputs: dict[str, np.ndarray]) -> np.ndarray:
            asked.append(name)
            return model.predict(inputs)

        return predict

    model.streams = 2
    under = Batcher(of("whole"), model.collate)  # type: ignore[arg-type]
    under.spread(of("single"), 2)  # type: ignore[arg-type]
    under.submit([[1]])
    under.submit([[1], [2]])
    assert asked == ["whole", "single", "single"]
    until(lambda: not under.workers.busy)  # answers come before their thread goes
    asked.clear()
    model.gate.clear()
    both = [pool.submit(under.submit, [[1]])]
    until(lambda: len(asked) == 1)
    both.append(pool.submit(under.submit, [[2]]))
    until(lambda: len(asked) == 2)
    assert asked == ["whole", "single"]
    assert under.executor.running_s > 0
    model.gate.set()
    wait(both)
    assert under.executor.running_s == 0


def test_a_row_is_joined_in_whichever_batch_it_is(
    model: GatedModel, pool: ThreadPoolExecutor
) -> None:
    under = batcher(model)
    spread(model, under)
    model.gate.clear()
    first = [pool.submit(under.submit, [[n]], keys=[n]) for n in (1, 2)]
    until(lambda: len(model.batches) == 2)
    again = pool.submit(under.submit, [[2], [1], [2]], keys=[2, 1, 2])
    until(lambda: sum(len(rows) for batch in under._computing for rows in batch.values()) == 5)
    model.gate.set()
    wait(first)
    assert again.result(5).tolist() == [[2, 1], [1, 1], [2, 1]]
    assert len(model.batches) == 2


def test_a_batch_that_fails_leaves_the_other_threads_alone(
    model: GatedModel, pool: ThreadPoolExecutor
) -> None:
    under = batcher(model)
    spread(model, under)
    model.gate.clear()
    good, bad = (pool.submit(under.submit, [[n]]) for n in (1, BAD))
    until(lambda: len(model.batches) == 2)
    model.gate.set()
    assert good.result(5).tolist() == [[1, 1]]
    with pytest.raises(ValueError, match="bad row"):
        bad.result(5)
    until(lambda: not under.workers.busy)
    assert under.submit([[3]]).tolist() == [[3, 1]]


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


def test_without_a_thread_a_request_is_refused_and_the_next_is_not(
    model: GatedModel, no_threads: pytest.MonkeyPatch
) -> None:
    under, told = batcher(model), Told()
    for _ in range(2):
        with pytest.raises(OverloadedError, match="no thread to compute with"):
            under.start([[1]], told)
    assert not (under.workers.busy or under.queued_rows)
    no_threads.undo()
    under.start([[2]], told)
    until(lambda: not under.workers.busy)
    assert told.answers() == [[[2, 1]]]
    assert model.batches == [[[2]]]


def test_without_a_second_thread_the_first_computes_all(
    model: GatedModel, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    under, told = batcher(model), Told()
    spread(model, under)
    model.gate.clear()
    under.start([[1]], told)
    until(lambda: len(model.batches) == 1)
    request.getfixturevalue("no_threads")
    for n in range(2, 5):
        under.start([[n]], told)
    model.gate.set()
    until(lambda: len(told.tickets) == 4)
    until(lambda: not under.workers.busy)
    monkeypatch.undo()
    under.start([[5]], told)
    under.start([[6]], told)
    until(lambda: len(told.tickets) == 6 and not under.workers.busy)
    assert sorted(told.answers()) == [[[n, 1]] for n in range(1, 7)]


def test_who_is_left_behind_without_a_thread_goes_with_the_next(
    model: GatedModel, pool: ThreadPoolExecutor, no_threads: pytest.MonkeyPatch
) -> None:
    under = batcher(model)
    first = hold(model, under, pool)
    (second,) = queue(under, pool, [[[2]]])
    model.gate.set()
    assert first.result().tolist() == [[1, 1]]
    until(lambda: not under.workers.busy)
    assert under.queued_rows == 1
    assert under.submit([[3]]).tolist() == [[3, 1]]
    assert second.result().tolist() == [[2, 1]]
    assert not (under.workers.busy or under.queued_rows)


def test_two_threads_halve_the_wait(model: GatedModel) -> None:
    under = batcher(model)
    for rows in (1, 4, 16, 1, 4, 16):
        under.executor._cost.saw(rows, rows * 1e-3)
    under._queue.rows = 40
    before_s = under.wait_s
    assert under.spare_rows(0.6) == pytest.approx(200 - 40, rel=0.05), "a third of it"
    under.spread(model.predict, 2)
    assert under.wait_s == pytest.approx(before_s / 2)
    assert under.spare_rows(0.6) == pytest.approx(2 * 150 - 40, rel=0.05), "a quarter of it"


def test_a_deep_queue_is_not_searched_for_long(model: GatedModel) -> None:
    waiting = Queue()
    limits = Limits()
    for n in range(4000):
        ticket = Ticket([[1] * (5 + n % 20)], None, limits, True, None)
        ticket.chunks = cut([5 + n % 20], [0], limits, 2, 16)
        waiting.push(ticket)
    start = time.perf_counter()
    batches = [waiting.take(limits, 2, 16) for _ in range(100)]
    assert time.perf_counter() - start < 0.1, "0.05 ms a batch; 5 ms where all are looked at"
    assert all(len(batch) == 16 for batch in batches)
    assert waiting.rows == 4000 - 1600
