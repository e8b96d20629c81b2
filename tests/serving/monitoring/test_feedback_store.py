"""Answers and feedback in SQLite: shared, bounded, and each row is judged once."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mlflow_pt_deploy.errors import RequestError
from mlflow_pt_deploy.serving.monitoring.feedback_store import (
    Answers,
    Feedback,
    FeedbackStore,
    Judged,
    create_store,
)

LABELS = ("red", "green", "blue")


@pytest.fixture
def store(tmp_path: Path) -> FeedbackStore:
    create_store(tmp_path)
    return FeedbackStore(tmp_path, 1000)


def answers(
    request_id: str, *answered: str, version: str = "1", labels: Sequence[str] = LABELS
) -> Answers:
    return Answers(request_id, "tiny", version, labels, 0.0, answered)


def test_feedback_finds_answers_of_any_worker(store: FeedbackStore, tmp_path: Path) -> None:
    store.add([answers("a", "red"), answers("b", "red", "blue", version="2")])
    other = FeedbackStore(tmp_path, 1000)
    items = [Feedback("a", None, "red"), Feedback("b", 1, "green"), Feedback("c", 0, "red")]
    assert other.judge(items) == [True, True, False]
    assert other.judge([Feedback("b", 2, "red"), Feedback("a", 1, "red")]) == [False, False]
    assert store.judged() == {
        ("tiny", "1"): [Judged("red", "red", 1)],
        ("tiny", "2"): [Judged("blue", "green", 1)],
    }


def test_feedback_sent_twice_counts_once_and_the_last_wins(store: FeedbackStore) -> None:
    store.add([answers("a", "red")])
    for label in ("red", "red", "blue", "green"):
        assert store.judge([Feedback("a", 0, label)]) == [True]
    assert store.judged() == {("tiny", "1"): [Judged("red", "green", 1)]}


def test_old_answers_are_forgotten_and_what_they_were_judged_stays(tmp_path: Path) -> None:
    create_store(tmp_path)
    store = FeedbackStore(tmp_path, 3)
    store.add([answers("a", "red", "red")])
    assert store.judge([Feedback("a", 0, "red")]) == [True]
    store.add([answers("b", "blue", "blue")])
    known = store.judge(
        [Feedback("a", 0, "blue"), Feedback("a", 1, "blue"), Feedback("b", 1, "red")]
    )
    assert known == [False, True, True]
    assert sum(cell.rows for cell in store.judged()["tiny", "1"]) == 3


def test_a_request_id_that_is_used_again_means_the_last_answer(store: FeedbackStore) -> None:
    store.add([answers("a", "red")])
    store.judge([Feedback("a", 0, "red")])
    store.add([answers("a", "blue", version="2")])
    store.judge([Feedback("a", 0, "red")])
    assert store.judged() == {
        ("tiny", "1"): [Judged("red", "red", 1)],
        ("tiny", "2"): [Judged("blue", "red", 1)],
    }


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (Feedback("b", None, "red"), "item 1 has no 'row', and its request had several"),
        (Feedback("b", 0, "cat"), "item 1: 'label' is not a label of the model that answered"),
        (Feedback("c", 0, "red"), "item 1: 'label' is not a label of the model that answered"),
    ],
    ids=["no row", "an unknown label", "a label of another model"],
)
def test_an_invalid_item_is_named_and_nothing_is_counted(
    store: FeedbackStore, item: Feedback, message: str
) -> None:
    store.add([answers("a", "red"), answers("b", "red", "red")])
    store.add([answers("c", "cat", labels=("cat", "dog"))])
    with pytest.raises(RequestError, match=message):
        store.judge([Feedback("a", 0, "red"), item])
    assert store.judged() == {}


def test_workers_write_at_the_same_time(store: FeedbackStore, tmp_path: Path) -> None:
    def work(worker: int) -> None:
        own = FeedbackStore(tmp_path, 1000)
        for number in range(20):
            own.add([answers(f"{worker}-{number}", "red")])
            assert own.judge([Feedback(f"{worker}-{number}", 0, "blue")]) == [True]

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert store.judged() == {("tiny", "1"): [Judged("red", "blue", 80)]}
