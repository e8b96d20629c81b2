"""Out of memory: parts that fit, a limit that is remembered and raised, rows that never fit."""

from __future__ import annotations

import logging
import math
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mlflow_pt_deploy.errors import DeviceMemoryError
from mlflow_pt_deploy.runtimes import device_memory
from mlflow_pt_deploy.runtimes.base import Inputs, Logits, streams_of, tokens_computed
from mlflow_pt_deploy.runtimes.device_memory import (
    CALLS,
    MAX_PAUSE_S,
    PAUSE_S,
    BatchLimit,
    DeviceMemory,
    DeviceMemoryGuard,
    PartialBatchError,
    memory_of,
    unguarded,
)


def texts(*lengths: int) -> Inputs:
    """Rows of these lengths, padded; their ids are the row's number."""
    longest = max(lengths)
    mask = np.array([[1] * length + [0] * (longest - length) for length in lengths])
    return {"input_ids": mask * np.arange(1, len(lengths) + 1)[:, None], "attention_mask": mask}


class SmallDevice:
    """Answers a row with (its id, its tokens) if the batch has at most `size` tokens."""

    pads = False
    single = "single"
    threads = 3

    def __init__(self, size: float, error: Callable[[], Exception] | None = None) -> None:
        self.size = size
        self.sizes: list[int] = []
        self.tokens = 0
        self._error = error

    def __call__(self, inputs: Inputs) -> Logits:
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        self.sizes.append(ids.size)
        if ids.size > self.size:
            if self._error is not None:
                raise self._error()
            raise _out_of_memory()
        self.tokens = ids.size
        return np.stack([ids.max(1), mask.sum(1)], axis=1).astype(np.float32)


def _out_of_memory() -> Exception:
    import torch

    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def guard(device: Any, clock: Clock | None = None) -> DeviceMemoryGuard:
    return DeviceMemoryGuard(device, "student on cuda", "cuda", clock or Clock())


def expected(*lengths: int) -> list[list[int]]:
    return [[number, length] for number, length in enumerate(lengths, 1)]


def test_a_batch_that_fits_is_one_call() -> None:
    device = SmallDevice(100)
    predict = guard(device)
    assert predict(texts(4, 2)).tolist() == expected(4, 2)
    assert device.sizes == [8]
    assert predict.memory == DeviceMemory(0, 0)


def test_parts_are_computed_and_the_limit_is_remembered() -> None:
    device = SmallDevice(10)
    predict = guard(device)
    lengths = (4,) * 9
    assert predict(texts(*lengths)).tolist() == expected(*lengths)
    assert device.sizes == [36, 16, 8, 8, 8, 8, 4]
    assert predict.memory == DeviceMemory(8, 2)
    assert predict(texts(*lengths)).tolist() == expected(*lengths)
    assert device.sizes[7:] == [8, 8, 8, 8, 4]


def test_short_rows_do_not_pay_for_the_longest() -> None:
    device = SmallDevice(10)
    lengths = (2, 2, 8, 2)
    assert guard(device)(texts(*lengths)).tolist() == expected(*lengths)
    assert device.sizes == [32, 4, 16, 8, 2]


def test_a_row_that_does_not_fit_fails_alone() -> None:
    device = SmallDevice(10)
    predict = guard(device)
    with pytest.raises(DeviceMemoryError, match="a row needs more memory than is free") as error:
        predict(texts(4, 12, 4, 16, 4))
    assert isinstance(error.value, PartialBatchError)
    assert error.value.rows == {1, 3}
    assert error.value.logits is not None
    kept = [0, 2, 4]
    assert error.value.logits[kept].tolist() == [[1, 4], [3, 4], [5, 4]]
    assert np.isnan(error.value.logits[[1, 3]]).all()
    assert 16 not in device.sizes, "a longer row than one that failed is not tried"


@pytest.mark.parametrize("rows", [1, 5])
def test_a_device_without_any_memory_costs_few_calls(rows: int) -> None:
    device = SmallDevice(0)
    predict = guard(device)
    with pytest.raises(PartialBatchError) as error:
        predict(texts(*[4] * rows))
    assert error.value.rows == set(range(rows))
    assert error.value.logits is None
    assert len(device.sizes) <= 3
    device.size = math.inf
    assert predict(texts(4)).tolist() == expected(4)


def test_images_count_as_rows() -> None:
    sizes = []

    def predict(inputs: Inputs) -> Logits:
        sizes.append(len(inputs["pixel_values"]))
        if sizes[-1] > 2:
            raise _out_of_memory()
        return inputs["pixel_values"].mean(axis=(2, 3)).astype(np.float32)

    guarded = guard(predict)
    images = np.random.default_rng(0).random((5, 3, 4, 4))
    np.testing.assert_allclose(
        guarded({"pixel_values": images}), images.mean(axis=(2, 3)), rtol=1e-6
    )
    assert sizes == [5, 2, 2, 1]
    assert guarded.memory.batch_limit == 2


def test_the_limit_is_raised_until_the_full_size_works(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mlflow_pt_deploy")
    device, clock = SmallDevice(10), Clock()
    predict = guard(device, clock)
    batch = texts(*[4] * 8)
    predict(batch)
    assert predict.memory.batch_limit == 8
    device.size = math.inf
    for limit in (16, 32, 0):
        for _ in range(CALLS):
            predict(batch)
        clock.now += PAUSE_S
        predict(batch)
        assert predict.memory.batch_limit == limit
    device.sizes.clear()
    predict(batch)
    assert device.sizes == [32]
    assert predict.memory.out_of_memory == 2
    logged = [record.getMessage().partition(": ")[2] for record in caplog.records]
    assert logged == [
        "out of memory; now at most 8 tokens or images a call",
        "now at most 16 tokens or images a call",
        "now at most 32 tokens or images a call",
        "batches of any size fit again",
    ]


@pytest.mark.parametrize(
    ("calls", "seconds", "size"),
    [(CALLS, PAUSE_S, 8), (CALLS - 1, PAUSE_S, 4), (CALLS, PAUSE_S - 1, 4)],
)
def test_time_and_calls_raise_the_limit(calls: int, seconds: float, size: int) -> None:
    limit = BatchLimit()
    limit.failed(8, 0.0)
    for _ in range(calls):
        limit.succeeded(seconds)
    assert limit.size == size


def test_the_pause_grows_while_tries_fail() -> None:
    limit, now, pauses = BatchLimit(), 0.0, []
    limit.failed(64, now)
    for _ in range(9):
        start = now
        while limit.size == 32:
            now += 1
            for _ in range(CALLS):
                limit.succeeded(now)
        pauses.append(now - start)
        limit.failed(64, now)
    assert pauses == [5, 10, 20, 40, 80, 160, 320, MAX_PAUSE_S, MAX_PAUSE_S]
    while limit.size == 32:
        now += MAX_PAUSE_S
        limit.succeeded(now)
    limit.failed(64, now + 3 * MAX_PAUSE_S)
    for _ in range(CALLS):
        limit.succeeded(now + 3 * MAX_PAUSE_S + PAUSE_S)
    assert limit.size == 64, "after a long time without an error the pause is short again"


def test_concurrent_failures_of_one_size_halve_once() -> None:
    limit = BatchLimit()
    for _ in range(3):
        limit.failed(64, 0.0)
    assert limit.size == 32
    limit.failed(32, 0.0)
    assert limit.size == 16
    assert (limit.rows(4), limit.rows(16), limit.rows(17)) == (4, 1, 1)


def test_concurrent_callers() -> None:
    """Callers share the device: together they have room for one full batch."""
    lock, used = threading.Lock(), [0]

    def predict(inputs: Inputs) -> Logits:
        size = inputs["input_ids"].size
        with lock:
            full = used[0] + size > 32
            used[0] += 0 if full else size
        if full:
            raise _out_of_memory()
        try:
            return SmallDevice(math.inf)(inputs)
        finally:
            with lock:
                used[0] -= size

    guarded = guard(predict)

    def call(number: int) -> int:
        lengths = [1 + (number + each) % 4 for each in range(8)]
        try:
            assert guarded(texts(*lengths)).tolist() == expected(*lengths)
        except PartialBatchError as error:
            assert error.logits is not None
            kept = [each for each in range(8) if each not in error.rows]
            assert error.logits[kept].tolist() == np.array(expected(*lengths))[kept].tolist()
        return number

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(call, range(200))) == list(range(200))
    assert used == [0]


@pytest.mark.parametrize("error", [ValueError("bad"), RuntimeError("API call failed at x.cpp")])
def test_other_errors_pass(error: Exception) -> None:
    device = SmallDevice(10, lambda: error)
    predict = guard(device)
    with pytest.raises(type(error)) as raised:
        predict(texts(8, 8))
    assert raised.value is error
    assert device.sizes == [16]
    assert predict.memory == DeviceMemory(0, 0)


def test_a_compiled_package_tells_memory_only_by_the_allocator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failures = [0]
    monkeypatch.setattr(device_memory, "failed_allocations", lambda device: failures[0])

    def failed() -> Exception:
        failures[0] += 1
        return RuntimeError("run_func_(...) API call failed at runner.cpp, line 145")

    assert guard(SmallDevice(10, failed))(texts(4, 4, 4)).tolist() == expected(4, 4, 4)


def test_an_error_that_followed_from_one_of_memory_counts() -> None:
    def wrapped() -> Exception:
        try:
            try:
                raise _out_of_memory()
            except Exception:
                raise RuntimeError("the capture was invalidated")  # noqa: B904
        except Exception as error:
            return error

    assert guard(SmallDevice(10, wrapped))(texts(4, 4, 4)).tolist() == expected(4, 4, 4)


def test_the_models_attributes_are_the_guards() -> None:
    device = SmallDevice(100)
    predict = guard(device)
    predict(texts(3, 3))
    assert (predict.pads, streams_of(predict)) == (False, ("single", 3))
    assert tokens_computed(predict, 0) == 6
    with pytest.raises(AttributeError):
        predict.models  # noqa: B018
    assert unguarded(predict) is device
    assert unguarded(device) is device


def test_memory_of_a_cascade_is_that_of_its_stages() -> None:
    fast, strong = guard(SmallDevice(10)), guard(SmallDevice(20))
    cascade: Any = SimpleNamespace(models=(fast, strong))
    assert memory_of(cascade) == DeviceMemory(0, 0)
    strong(texts(*[4] * 8))
    assert memory_of(cascade) == DeviceMemory(16, 1)
    fast(texts(*[4] * 8))
    assert memory_of(cascade) == DeviceMemory(8, 3)
    assert memory_of(SmallDevice(10)) is None


def test_the_error_can_be_sent_to_another_process() -> None:
    error = PartialBatchError("short", frozenset({1}), np.ones((2, 3), np.float32))
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.rows) == ("short", {1})
    assert copy.logits.tolist() == [[1, 1, 1], [1, 1, 1]]


@pytest.mark.gpu
def test_a_real_device() -> None:
    """A model whose batches do not fit, and then fit again."""
    import torch

    free, _ = torch.cuda.mem_get_info()
    unit = free // 8

    def predict(inputs: Inputs) -> Logits:
        torch.empty(unit * len(inputs["input_ids"]), dtype=torch.uint8, device="cuda")
        return SmallDevice(math.inf)(inputs)

    clock = Clock()
    guarded = DeviceMemoryGuard(predict, "student on cuda", "cuda", clock)
    lengths = (4,) * 16
    assert guarded(texts(*lengths)).tolist() == expected(*lengths)
    limit, events = guarded.memory
    assert 4 <= limit <= 32
    assert events >= 1
    held = torch.empty(int(unit * 7.5), dtype=torch.uint8, device="cuda")
    with pytest.raises(PartialBatchError):
        guarded(texts(4, 4))
    del held
    torch.cuda.empty_cache()
    assert guarded(texts(4, 4)).tolist() == expected(4, 4)
