"""Rows side by side: the same answers in the same order, each row by one thread unless it pays."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import combinations, pairwise

import numpy as np
import pytest

from mlflow_pt_deploy.runtimes import streams
from mlflow_pt_deploy.runtimes.base import Inputs, Logits, pads_rows, tokens_computed
from mlflow_pt_deploy.runtimes.cascade import CascadePredictor
from mlflow_pt_deploy.runtimes.streams import Streams, cut


class Clock:
    """Stands still unless a model computes."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Model:
    """Answers with what a row holds and how long it is; takes so long for each token."""

    def __init__(self, token_s: float = 0.0, clock: Clock | None = None) -> None:
        self.token_s = token_s
        self.clock = clock or Clock()
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, inputs: Inputs) -> Logits:
        self.shapes.append(next(iter(inputs.values())).shape)
        self.clock.now += self.token_s * next(iter(inputs.values())).size
        return answer(inputs)


def answer(inputs: Inputs) -> Logits:
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
    """Both ways take so long for each token, by a clock of their own."""
    clock = Clock()
    monkeypatch.setattr(streams, "perf_counter", clock)
    whole, single = Model(whole_s, clock), Model(single_s, clock)
    return Streams(whole, single, threads=threads), whole, single


def settle(predict: Streams) -> None:
    for _ in range(100):
        predict(batch(5))


def test_parts_hold_each_row_once_longest_first_and_little_padding() -> None:
    lengths = (3, 7, 4, 1, 9, 7, 7)
    parts = cut(batch(*lengths), 3)
    shapes = [part.inputs["attention_mask"].shape for part in parts]
    assert shapes == [(1, 9), (3, 7), (3, 4)]
    assert sorted(place for part in parts for place in part.places) == list(range(7))
    for part in parts:
        mine = part.inputs["attention_mask"].sum(1)
        assert mine.tolist() == [lengths[place] for place in part.places]
        assert len(mine) * mine.max() - mine.sum() <= 5 * (len(mine) - 1)


def tokens_and_calls(lengths: list[int], most: int, cuts: Sequence[int]) -> int:
    """What rows cost that are cut there."""
    bounds = [0, *cuts, len(lengths)]
    runs = [lengths[start:end] for start, end in pairwise(bounds)]
    return sum(len(run) * run[0] + 5 * -(-len(run) // most) for run in runs)


@pytest.mark.parametrize("most", [1, 2, 3, 8])
def test_no_other_parts_cost_less(most: int) -> None:
    random = np.random.default_rng(most)
    for _ in range(50):
        lengths = sorted(random.integers(1, 30, size=random.integers(1, 8)).tolist(), reverse=True)
        changes = [at for at in range(1, len(lengths)) if lengths[at] != lengths[at - 1]]
        least = min(
            tokens_and_calls(lengths, most, cuts)
            for number in range(len(changes) + 1)
            for cuts in combinations(changes, number)
        )
        parts = cut(batch(*lengths), most)
        assert all(len(part.places) <= most for part in parts)
        padded = sum(part.inputs["attention_mask"].size for part in parts)
        assert padded + 5 * len(parts) <= least  # halves of a run may be shorter than its longest


def test_a_few_rows_of_a_length_are_one_call_and_many_a_few_for_each_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    predict, _, single = timed(monkeypatch, 1.0, 1.0)
    settle(predict)
    for rows, expected in ((2, [1, 1]), (5, [3, 2]), (8, [4, 4]), (16, [4] * 4), (32, [8] * 4)):
        single.shapes.clear()
        predict(batch(*[5] * rows))
        assert sorted((shape[0] for shape in single.shapes), reverse=True) == expected


def test_it_tells_the_tokens_that_it_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    predict, _, _ = timed(monkeypatch, 1.0, 1.0)
    assert tokens_computed(predict, 77) == 77, "nothing was computed yet"
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
def test_answers_come_in_the_order_of_the_rows(
    monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    predict, whole, single = timed(monkeypatch, 1.0, 1.0, threads)
    settle(predict)
    whole.shapes.clear()
    rows = batch(4, 9, 2, 9, 9, 4, 1, 30)
    np.testing.assert_array_equal(predict(rows), answer(rows))
    assert not whole.shapes
    assert (1, 30) in single.shapes


def test_images_of_a_size_stay_together(monkeypatch: pytest.MonkeyPatch) -> None:
    predict, whole, single = timed(monkeypatch, 1.0, 1.0)
    pixels = np.arange(5 * 4, dtype=np.float32).reshape(5, 2, 2)
    for _ in range(3):
        predict({"pixels": pixels[:1]})
    single.shapes.clear()
    np.testing.assert_array_equal(predict({"pixels": pixels}), answer({"pixels": pixels}))
    assert whole.shapes[-1] == (5, 2, 2)
    assert not single.shapes


def test_two_parts_are_computed_at_a_time() -> None:
    together = threading.Barrier(2, timeout=20)

    def meets(inputs: Inputs) -> Logits:
        if len(inputs["input_ids"]) > 1 or inputs["input_ids"].size > 1:
            together.wait()  # broken where one thread does all
        return answer(inputs)

    predict = Streams(answer, meets, threads=2)
    predict._single._cost.saw(1, 1.0)
    rows = batch(3, 9)
    np.testing.assert_array_equal(predict(rows), answer(rows))


def test_a_row_alone_gets_all_threads_only_where_they_are_sooner(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for whole_s, most_by in ((0.95, "single"), (0.5, "whole")):
        predict, whole, single = timed(monkeypatch, whole_s, 1.0)
        settle(predict)
        before = {"whole": len(whole.shapes), "single": len(single.shapes)}
        for _ in range(128):
            predict(batch(5))
        asked = {"whole": len(whole.shapes), "single": len(single.shapes)}
        assert asked[most_by] - before[most_by] == 126, "one of 64 tries the other way"


def test_what_was_better_is_noticed_when_it_is_not_any_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    predict, whole, single = timed(monkeypatch, 0.5, 1.0)
    settle(predict)
    single.token_s = 0.25  # the other cores have got other work, say
    for _ in range(64 * 40):
        predict(batch(5))
    asked = len(whole.shapes)
    for _ in range(128):
        predict(batch(5))
    assert len(whole.shapes) - asked == 2


def test_rows_cheaper_than_a_call_stay_together(monkeypatch: pytest.MonkeyPatch) -> None:
    predict, whole, single = timed(monkeypatch, 1e-6, 1e-6)
    settle(predict)
    single.shapes.clear()
    predict(batch(3, 5, 8, 1))
    assert whole.shapes[-1] == (4, 8)
    assert not single.shapes


def test_fewer_rows_than_threads_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    predict, whole, _ = timed(monkeypatch, 1.0, 1.0, threads=4)
    settle(predict)
    predict(batch(3, 5, 8))
    assert whole.shapes[-1] == (3, 8)


def test_an_error_in_any_part_is_the_batchs_and_the_next_batch_is_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def bad(inputs: Inputs) -> Logits:
        if inputs["input_ids"].shape[1] == 3:
            raise ValueError("a length of three")
        return answer(inputs)

    predict = Streams(answer, bad, threads=2)
    predict._single._cost.saw(1, 1.0)
    for _ in range(20):
        with pytest.raises(ValueError, match="a length of three"):
            predict(batch(9, 3, 4, 3))
    rows = batch(9, 4, 4)
    np.testing.assert_array_equal(predict(rows), answer(rows))


def test_a_cascade_pads_where_one_of_its_models_does() -> None:
    apart = Streams(answer, answer, threads=2)
    assert not pads_rows(apart)
    assert not pads_rows(CascadePredictor(apart, apart, 0.5))
    assert pads_rows(CascadePredictor(apart, answer, 0.5))
    assert pads_rows(CascadePredictor(answer, apart, 0.5))
