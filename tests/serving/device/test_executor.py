"""Batches of several workers are one call, with the results that each has alone."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
from tiny.server import until
from tiny.serving import TinyVariant, predict, tiny_images, tiny_variant

from mlflow_pt_deploy.errors import ServingError
from mlflow_pt_deploy.model_config import Limits
from mlflow_pt_deploy.runtimes.base import Inputs, Logits
from mlflow_pt_deploy.serving.device.executor import (
    DeviceExecutor,
    HeldModel,
    Job,
    next_jobs,
    stream_contexts,
)

TEXTS = ["red", "green green blue", "blue " * 9, "red green"]


def held(variant: TinyVariant, **limits: int) -> HeldModel:
    return HeldModel(variant, Limits(**limits))  # type: ignore[arg-type]


def job(model: HeldModel, rows: int, length: int = 4) -> Job:
    array = np.zeros((rows, length), dtype=np.int64)
    return Job(model, {"input_ids": array, "attention_mask": array})


class Gate:
    """The tiny model; calls wait while it is shut."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.rows: list[int] = []

    def __call__(self, inputs: Inputs) -> Logits:
        self.rows.append(len(inputs["input_ids"]))
        assert self.open.wait(10)
        return predict(inputs)


def test_waiting_batches_are_joined_within_the_limits() -> None:
    model = held(tiny_variant(), max_batch_rows=8, max_batch_tokens=64)
    other = held(tiny_variant())
    jobs = [
        job(model, 4),
        job(other, 1),
        job(model, 5),
        job(model, 3),
        job(model, 1, 12),
        job(model, 1),
    ]
    assert next_jobs(jobs) == [jobs[0], jobs[3], jobs[5]]
    assert next_jobs(jobs[1:]) == [jobs[1]]


def test_a_batch_beyond_the_limits_is_computed_alone() -> None:
    model = held(tiny_variant(), max_batch_rows=2, max_batch_tokens=8)
    jobs = [job(model, 4, 99), job(model, 1)]
    assert next_jobs(jobs) == jobs[:1]


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_joined_batches_have_the_results_of_each_alone(padding_side: str) -> None:
    gate, variant = Gate(), tiny_variant()
    variant.preprocessor.padding_side = padding_side  # type: ignore[attr-defined]
    model = held(replace(variant, predict=gate))
    executor = DeviceExecutor([nullcontext])
    batches = [variant.preprocessor([text] * 2) for text in TEXTS]
    with ThreadPoolExecutor(len(TEXTS)) as workers:
        found = [workers.submit(executor.run, model, batches[0])]
        until(lambda: gate.rows)
        found += [workers.submit(executor.run, model, batch) for batch in batches[1:]]
        until(lambda: len(executor._waiting) == len(TEXTS) - 1)
        assert executor.running_s > 0
        gate.open.set()
        for batch, future in zip(batches, found, strict=True):
            np.testing.assert_array_equal(future.result(), predict(batch))
    assert gate.rows == [2, 6]
    assert executor.running_s == 0


def test_images_are_joined() -> None:
    preprocessor = tiny_images().preprocessor
    batches = [{"pixel_values": np.full((rows, 3, 4, 4), rows, np.float32)} for rows in (1, 2)]
    joined = preprocessor.join(batches)["pixel_values"]
    assert joined[:, 0, 0, 0].tolist() == [1, 2, 2]


def test_rows_that_fail_fail_their_own_worker_only() -> None:
    gate, variant = Gate(), tiny_variant()
    model = held(replace(variant, predict=gate))
    executor = DeviceExecutor([nullcontext])
    with ThreadPoolExecutor(3) as workers:
        first = workers.submit(executor.run, model, variant.preprocessor(["red"]))
        until(lambda: gate.rows)
        good = workers.submit(executor.run, model, variant.preprocessor(["blue"]))
        bad = workers.submit(executor.run, model, variant.preprocessor(["explode"]))
        until(lambda: len(executor._waiting) == 2)
        gate.open.set()
        assert first.result().tolist() == [[1, 0, 0]] and good.result().tolist() == [[0, 0, 1]]
        with pytest.raises(RuntimeError, match="exploded"):
            bad.result()
    assert gate.rows == [1, 2, 1, 1]


def test_a_model_that_loses_rows_is_an_error() -> None:
    model = held(replace(tiny_variant(), predict=lambda inputs: predict(inputs)[1:]))
    with pytest.raises(ServingError, match="returned 0 rows for 1"):
        DeviceExecutor([nullcontext]).run(model, tiny_variant().preprocessor(["red"]))


def test_a_cpu_has_one_thread() -> None:
    assert stream_contexts("cpu") == [nullcontext]
