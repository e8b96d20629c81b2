"""Augmented texts: new, texts of known words, reproducible by seed."""

from __future__ import annotations

import pytest

from mlflow_pt_deploy.training.augmentation import make_texts

ROWS = (
    "where is my new card",
    "the transfer did not arrive yet",
    "how do I change my address",
    "top up",
)


def test_texts_are_new_and_use_known_words() -> None:
    texts = make_texts(ROWS, 50)
    assert len(texts) == len(set(texts)) == 50
    assert not set(texts) & set(ROWS)
    assert {word for text in texts for word in text.split()} <= set(" ".join(ROWS).split())
    assert max(len(text.split()) for text in texts) > 6  # spliced
    assert min(len(text.split()) for text in texts) < 4  # n-grams


def test_seed_determines_the_texts() -> None:
    assert make_texts(ROWS, 20) == make_texts(ROWS, 20)
    assert make_texts(ROWS, 20) != make_texts(ROWS, 20, seed=1)


@pytest.mark.parametrize("rows", [(), ("one",), ("", " ")])
def test_no_usable_rows_give_no_texts(rows: tuple[str, ...]) -> None:
    assert make_texts(rows, 10) == ()


def test_few_rows_give_few_texts() -> None:
    assert 0 < len(make_texts(("top up",), 1000)) < 20
