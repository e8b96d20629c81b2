"""The batcher: failing rows, full queues, deadlines and clients that disconnect."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import pytest
from tiny.batching import BAD, GatedModel, hold, new_batcher, queue, until

from mlflow_pt_deploy.errors import (
    DeadlineError,
    DeviceLostError,
    DeviceMemoryError,
    OverloadedError,
    ServingError,
)
from mlflow_pt_deploy.runtimes.device_memory import DeviceMemoryGuard
from mlflow_pt_deploy.serving.batching.batcher import Batcher
from mlflow_pt_deploy.serving.batching.request import RequestContext


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


def test_a_row_without_memory_fails_alone_and_costs_no_bisection(
    model: GatedModel, pool: ThreadPoolExecutor
) -> None:
    def predict(inputs: dict[str, np.ndarray]) -> np.ndarray:
        logits = model.predict(inputs)
        if inputs["ids"].size > 8:
            raise RuntimeError("CUDA error: out of memory")
        return logits

    def collate(rows: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
        inputs = model.collate(rows)
        return inputs | {"attention_mask": inputs["ids"] != 0}

    batcher = Batcher(DeviceMemoryGuard(predict, "tiny", "cuda"), collate)  # type: ignore[arg-type]
    first = hold(model, batcher, pool)
    good = queue(batcher, pool, [[[n]] for n in range(2, 9)])
    bad = queue(batcher, pool, [[[9] * 9, [10]]])
    good += queue(batcher, pool, [[[n]] for n in range(11, 18)])
    model.gate.set()
    with pytest.raises(DeviceMemoryError, match="a row needs more memory"):
        bad[0].result()
    assert [int(f.result()[0, 0]) for f in good] == [*range(2, 9), *range(11, 18)]
    assert first.result().tolist() == [[1, 1]]
    model.batches.clear()
    with pytest.raises(DeviceMemoryError):
        batcher.submit([[9] * 9] * 4)
    assert len(model.batches) == 1, "equal rows, of which one was tried"


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


def test_a_lost_device_fails_the_whole_batch_in_one_call(model: GatedModel) -> None:
    calls = []

    def lost(inputs: dict[str, np.ndarray]) -> np.ndarray:
        calls.append(len(inputs["ids"]))
        raise DeviceLostError("the process of cuda:0 has ended")

    with pytest.raises(DeviceLostError):
        Batcher(lost, model.collate).submit([[1], [2], [3], [4]])
    assert calls == [4]
