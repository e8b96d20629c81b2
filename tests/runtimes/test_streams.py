"""Streams: results in row order, optimal groups, and the choice between one and all threads."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import combinations, pairwise

import numpy as np
import pytest

from mlflow_pt_deploy.runtimes import streams
from mlflow_pt_deploy.runtimes.base import Inputs, Logits, pads_rows, tokens_computed
from mlflow_pt_deploy.runtimes.cascade import CascadePredictor
from mlflow_pt_deploy.runtimes.streams import Streams, group_rows


class Clock:
    """A clock that advances only when a model computes."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Model:
    """Returns the sum and the length of each row; takes `token_s` seconds per token."""

    def __init__(self, token_s: float = 0.0, clock: Clock | None = None) -> None:
        self.token_s = token_s
        self.clock = clock or Clock()
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, inputs: Inputs) -> Logits:
        self.shapes.append(next(iter(inputs.values())).shape)
        self.clock.now += self.token_s * next(iter(inputs.values())).size
        return logits_of(inputs)


def logits_of(inputs: Inputs) -> Logits:
    if "pixels" in inputs:
        return inputs["pixels"].sum((1, 2))[:, None].astype(np.float32)
    mask = inputs["attention_mask"]
    return np.stack([(inputs["input_ids"] * mask).sum(1), mask.sum(1)], axis=1).astype(np.float32)


def batch(*lengths: int) -> Inputs:
    mask = (np.arange(max(lengths)) < np.asarray(lengths)[:, None]).astype(np.int64)
    ids = np.arange(1, mask.size + 1).reshape(mask.shape) * mask
    return {"input_ids": ids, "attention_mask": mask}


def timed(
    monkeypatch: pytest.MonkeyPatch, whole_s: float, single_s: float, threads: int = 2
) -> tuple[Streams, Model, Model]:
    """Streams over two models with the given seconds per token, on a simulated clock."""
    clock = Clock()
    monkeypatch.setattr(streams, "perf_counter", clock)
    whole, single = Model(whole_s, clock), Model(single_s, clock)
    return Streams(whole, single, threads=threads), whole, single


def settle(predict: Streams) -> None:
    for _ in range(100):
        predict(batch(5))


def test_groups_hold_each_row_once_with_little_padding() -> None:
    lengths = (3, 7, 4, 1, 9, 7, 7)
    groups = group_rows(batch(*lengths), 3)
    shapes = [group.inputs["attention_mask"].shape for group in groups]
    assert shapes == [(1, 9), (3, 7), (3, 4)]
    assert sorted(row for group in groups for row in group.indices) == list(range(7))
    for group in groups:
        actual = group.inputs["attention_mask"].sum(1)
        assert actual.tolist() == [lengths[row] for row in group.indices]
        assert len(actual) * actual.max() - actual.sum() <= 5 * (len(actual) - 1)


def cost_of(lengths: list[int], max_rows: int, cuts: Sequence[int]) -> int:
    """Cost in tokens of rows that are split at `cuts`."""
    bounds = [0, *cuts, len(lengths)]
    runs = [lengths[start:end] for start, end in pairwise(bounds)]
    return sum(len(run) * run[0] + 5 * -(-len(run) // max_rows) for run in runs)


@pytest.mark.parametrize("max_rows", [1, 2, 3, 8])
def test_groups_are_optimal(max_rows: int) -> None:
    random = np.random.default_rng(max_rows)
    for _ in range(50):
        lengths = sorted(random.integers(1, 30, size=random.integers(1, 8)).tolist(), reverse=True)
        boundaries = [at for at in range(1, len(lengths)) if lengths[at] != lengths[at - 1]]
        minimum = min(
            cost_of(lengths, max_rows, cuts)
            for number in range(len(boundaries) + 1)
            for cuts in combinations(boundaries, number)
        )
        groups = group_rows(batch(*lengths), max_rows)
        assert all(len(group.indices) <= max_rows for group in groups)
        padded = sum(group.inputs["attention_mask"].size for group in groups)
        # "<=": a part of a run may be shorter than its longest row
        assert padded + 5 * len(groups) <= minimum


def test_number_of_rows_per_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    predict, _, single = timed(monkeypatch, 1.0, 1.0)
    settle(predict)
    for rows, expected in ((2, [1, 1]), (5, [3, 2]), (8, [4, 4]), (16, [4] * 4), (32, [8] * 4)):
        single.shapes.clear()
        predict(batch(*[5] * rows))
        assert sorted((shape[0] for shape in single.shapes), reverse=True) == expected


def test_number_of_computed_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    predict, _, _ = timed(monkeypatch, 1.0, 1.0)
    assert tokens_computed(predict, 77) == 77, "no batch was computed"
    settle(predict)
    assert tokens_computed(predict, 77) == 5
    predict(batch(9, 8, 3))
    assert tokens_computed(predict, 77) == 9 + 9 + 3
    cheap, _, _ = timed(monkeypatch, 1e-6, 1e-6)
    settle(cheap)
    cheap(batch(9, 8, 3))
    assert tokens_computed(cheap, 77) == 27
    cheap({"pixels": np.zeros((2, 2, 2), dtype=np.float32)})
    assert tokens_computed(cheap, 77) == 77


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_results_are_in_the_order_of_the_rows(
    monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    predict, whole, single = timed(monkeypatch, 1.0, 1.0, threads)
    settle(predict)
    whole.shapes.clear()
    rows = batch(4, 9, 2, 9, 9, 4, 1, 30)
    np.testing.assert_array_equal(predict(rows), logits_of(rows))
    assert not whole.shapes
    assert (1, 30) in single.shapes


def test_images_are_computed_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    predict, whole, single = timed(monkeypatch, 1.0, 1.0)
    pixels = np.arange(5 * 4, dtype=np.float32).reshape(5, 2, 2)
    for _ in range(3):
        predict({"pixels": pixels[:1]})
    single.shapes.clear()
    np.testing.assert_array_equal(predict({"pixels": pixels}), logits_of({"pixels": pixels}))
    assert whole.shapes[-1] == (5, 2, 2)
    assert not single.shapes


def test_two_groups_are_computed_in_parallel() -> None:
    barrier = threading.Barrier(2, timeout=20)

    def waits(inputs: Inputs) -> Logits:
        if len(inputs["input_ids"]) > 1 or inputs["input_ids"].size > 1:
            barrier.wait()  # fails if one thread computes all groups
        return logits_of(inputs)

    predict = Streams(logits_of, waits, threads=2)
    predict._single._latency.observe(1, 1.0)
    rows = batch(3, 9)
    np.testing.assert_array_equal(predict(rows), logits_of(rows))


def test_single_row_uses_all_threads_only_if_they_are_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for whole_s, expected in ((0.95, "single"), (0.5, "whole")):
        predict, whole, single = timed(monkeypatch, whole_s, 1.0)
        settle(predict)
        before = {"whole": len(whole.shapes), "single": len(single.shapes)}
        for _ in range(128):
            predict(batch(5))
        calls = {"whole": len(whole.shapes), "single": len(single.shapes)}
        assert calls[expected] - before[expected] == 126, "one of 64 rows uses the other way"


def test_change_of_the_faster_way_is_detected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    predict, whole, single = timed(monkeypatch, 0.5, 1.0)
    settle(predict)
    single.token_s = 0.25  # e.g. the other cores are busy now
    for _ in range(64 * 40):
        predict(batch(5))
    calls = len(whole.shapes)
    for _ in range(128):
        predict(batch(5))
    assert len(whole.shapes) - calls == 2


def test_cheap_rows_are_computed_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    predict, whole, single = timed(monkeypatch, 1e-6, 1e-6)
    settle(predict)
    single.shapes.clear()
    predict(batch(3, 5, 8, 1))
    assert whole.shapes[-1] == (4, 8)
    assert not single.shapes


def test_fewer_rows_than_threads_are_computed_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    predict, whole, _ = timed(monkeypatch, 1.0, 1.0, threads=4)
    settle(predict)
    predict(batch(3, 5, 8))
    assert whole.shapes[-1] == (3, 8)


def test_error_in_a_group_fails_only_its_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def bad(inputs: Inputs) -> Logits:
        if inputs["input_ids"].shape[1] == 3:
            raise ValueError("a length of three")
        return logits_of(inputs)

    predict = Streams(logits_of, bad, threads=2)
    predict._single._latency.observe(1, 1.0)
    for _ in range(20):
        with pytest.raises(ValueError, match="a length of three"):
            predict(batch(9, 3, 4, 3))
    rows = batch(9, 4, 4)
    np.testing.assert_array_equal(predict(rows), logits_of(rows))


def test_cascade_pads_rows_if_either_model_does() -> None:
    streamed = Streams(logits_of, logits_of, threads=2)
    assert not pads_rows(streamed)
    assert not pads_rows(CascadePredictor(streamed, streamed, 0.5))
    assert pads_rows(CascadePredictor(streamed, logits_of, 0.5))
    assert pads_rows(CascadePredictor(logits_of, streamed, 0.5))
