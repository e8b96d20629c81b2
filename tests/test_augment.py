"""Texts made from texts: new, of known words, the same for the same seed."""

from __future__ import annotations

import pytest

from mlflow_pt_deploy.training.augmentation import make_texts

ROWS = (
    "where is my new card",
    "the transfer did not arrive yet",
    "how do I change my address",
    "top up",
)


def test_made_texts_are_new_and_of_known_words() -> None:
    made = make_texts(ROWS, 50)
    assert len(made) == len(set(made)) == 50
    assert not set(made) & set(ROWS)
    assert {word for text in made for word in text.split()} <= set(" ".join(ROWS).split())
    assert max(len(text.split()) for text in made) > 6  # spliced
    assert min(len(text.split()) for text in made) < 4  # cut out


def test_a_seed_decides() -> None:
    assert make_texts(ROWS, 20) == make_texts(ROWS, 20)
    assert make_texts(ROWS, 20) != make_texts(ROWS, 20, seed=1)


@pytest.mark.parametrize("rows", [(), ("one",), ("", " ")])
def test_of_nothing_comes_nothing(rows: tuple[str, ...]) -> None:
    assert make_texts(rows, 10) == ()


def test_few_rows_give_few_texts_and_an_end() -> None:
    assert 0 < len(make_texts(("top up",), 1000)) < 20
