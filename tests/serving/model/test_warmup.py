"""Warm-up: shapes that a model computes before it serves."""

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tiny.serving import predict, tiny_images, tiny_variant

from mlflow_pt_deploy.model_config import Limits
from mlflow_pt_deploy.runtimes.cascade import CascadePredictor
from mlflow_pt_deploy.runtimes.streams import Streams
from mlflow_pt_deploy.serving.model.pyfunc import PtDeployPyFunc
from mlflow_pt_deploy.serving.model.warmup import warm_up_buckets, warm_up_shapes

BATCH = {"input_ids": np.ones((4, 40), np.int64), "attention_mask": np.ones((4, 40), np.int64)}


class ShapeModel:
    """A model whose first batch of a shape takes more CPU time than later ones."""

    def __init__(self, first_s: float, again_s: float) -> None:
        self.first_s, self.again_s = first_s, again_s
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, inputs: Any) -> Any:
        shape = inputs["input_ids"].shape
        end = time.thread_time() + (self.again_s if shape in self.shapes else self.first_s)
        while time.thread_time() < end:
            pass
        self.shapes.append(shape)
        return predict(inputs)


def test_small_batches_of_short_texts_are_warmed_up() -> None:
    model = ShapeModel(0.002, 0)
    assert warm_up_shapes([model], BATCH, max_s=20) == 128
    assert {(rows, length) for rows in range(1, 5) for length in range(1, 33)} == {*model.shapes}


def test_few_shapes_are_computed_where_a_new_one_costs_nothing() -> None:
    model = ShapeModel(0.02, 0.02)
    assert warm_up_shapes([model], BATCH, max_s=20) == 8


def test_warm_up_of_a_slow_model_is_limited_in_time() -> None:
    model = ShapeModel(0.05, 0)
    assert warm_up_shapes([model], BATCH, max_s=0.1) <= 3


@pytest.mark.parametrize("sure", [0.0, 2.0])
def test_both_models_of_a_cascade_are_warmed_up(sure: float) -> None:
    fast, strong = ShapeModel(0, 0), ShapeModel(0, 0)
    pyfunc = PtDeployPyFunc(replace(tiny_variant(), predict=CascadePredictor(fast, strong, sure)))  # type: ignore[arg-type]
    pyfunc.warm_up()
    assert (1, 1) in fast.shapes
    assert (1, 1) in strong.shapes


@pytest.mark.parametrize(
    ("takes_s", "threads", "streams"), [(0.002, 2, 2), (0.002, 1, 1), (0, 2, 1)]
)
def test_batches_of_a_model_with_streams_are_computed_side_by_side(
    takes_s: float, threads: int, streams: int
) -> None:
    def single(inputs: Any) -> Any:
        time.sleep(takes_s)
        return predict(inputs)

    variant = replace(tiny_variant(), predict=Streams(single, single, threads=threads))
    pyfunc = PtDeployPyFunc(variant)
    assert pyfunc.service.batcher.concurrency.streams == 1
    pyfunc.warm_up()
    assert pyfunc.service.batcher.concurrency.streams == streams, (
        "not where a row takes less time than a thread would"
    )
    words = ["red", "green", "blue", "red green", "green blue"] * 9
    labels = [answer["label"] for answer in pyfunc.predict(words)]
    assert labels == [answer["label"] for answer in PtDeployPyFunc(tiny_variant()).predict(words)]


class BucketModel(ShapeModel):
    """A model that prepares buckets of shapes."""

    prepared: tuple[int, int, int] | None = None

    def warm_up_buckets(self, rows: int, tokens: int, longest: int) -> None:
        self.prepared = rows, tokens, longest


@pytest.mark.parametrize(("variant", "longest"), [(tiny_variant(), 64), (tiny_images(), 1)])
def test_buckets_are_prepared_for_the_limits_of_a_batch(variant: Any, longest: int) -> None:
    model = BucketModel(0, 0)
    limits = Limits(max_batch_rows=8, max_batch_tokens=256)
    warm_up_buckets([predict, model], limits, variant.preprocessor)
    assert model.prepared == (8, 256, longest)
