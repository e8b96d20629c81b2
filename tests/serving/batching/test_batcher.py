"""The batcher: which rows share a batch. Real threads, and a model that can be held at a gate."""

import time
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import pytest
from tiny.batching import GatedModel, hold, new_batcher, queue, until

from mlflow_pt_deploy.model_config import Limits
from mlflow_pt_deploy.serving.batching.batcher import Batcher


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


def test_each_call_of_the_model_is_observed(model: GatedModel) -> None:
    batcher = new_batcher(model)
    done: list[tuple[int, int, int, float]] = []
    batcher.executor.on_call = lambda *numbers: done.append(numbers)
    batcher.submit([[5] * 3, [6], [7] * 2])
    assert [numbers[:3] for numbers in done] == [(3, 6, 9)]
    assert 0 < done[0][3] < 1


def test_where_padding_costs_nothing_lengths_do_not_matter(model: GatedModel) -> None:
    done: list[tuple[int, int, int]] = []
    batcher = Batcher(model.predict, model.collate, Limits(max_batch_tokens=1000), pads=False)
    batcher.executor.on_call = lambda rows, tokens, padded, _: done.append((rows, tokens, padded))
    batcher.submit([[1], [2] * 300, [3] * 200])
    batcher.submit([[1] * 600, [2] * 600])
    assert done == [(3, 501, 501), (1, 600, 600), (1, 600, 600)]
