"""Texts made from texts, for a teacher to label: a student may know more than train holds.

Dropping words and sampling n-grams follow Tang et al. (2019), who taught a BiLSTM from BERT with
them; splicing two rows follows their sentence pairs. What comes out need not make sense, and has
no label of its own: it only shows the student where the teacher would go.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

_DROPPED = (0.1, 0.4)  # share of the words
_SHORTEST = 2  # words of a made text
_PATIENCE = 4  # tries for each text that is wanted

Words = list[str]


def make_texts(rows: Sequence[str], count: int, *, seed: int = 0) -> tuple[str, ...]:
    """Make texts from rows of train: shortened, cut out, and spliced, a third each.

    Args:
        rows: Texts to make others from.
        count: How many; fewer where the rows are too few or too short to make so many.
        seed: The same seed makes the same texts.

    Returns:
        Texts that differ from each other and from `rows`, in the order they were made.
    """
    random = np.random.default_rng(seed)
    words = [row.split() for row in rows]
    words = [each for each in words if len(each) >= _SHORTEST]
    if not words:
        return ()
    known = {" ".join(each) for each in words}
    made: list[str] = []
    for _ in range(_PATIENCE * count):
        if len(made) == count:
            break
        way = _WAYS[random.integers(len(_WAYS))]
        first, second = (words[random.integers(len(words))] for _ in range(2))
        text = " ".join(way(first, second, random))
        if text and text not in known:
            known.add(text)
            made.append(text)
    return tuple(made)


def _shorten(first: Words, second: Words, random: np.random.Generator) -> Words:
    """Without some of its words."""
    kept = random.random(len(first)) >= random.uniform(*_DROPPED)
    return [word for word, keep in zip(first, kept, strict=True) if keep]


def _cut_out(first: Words, second: Words, random: np.random.Generator) -> Words:
    """A run of its words."""
    length = int(random.integers(_SHORTEST, len(first) + 1))
    start = int(random.integers(len(first) - length + 1))
    return first[start : start + length]


def _splice(first: Words, second: Words, random: np.random.Generator) -> Words:
    """The beginning of one and the end of another."""
    return first[: random.integers(1, len(first) + 1)] + second[random.integers(len(second)) :]


_WAYS: tuple[Callable[[Words, Words, np.random.Generator], Words], ...] = (
    _shorten,
    _cut_out,
    _splice,
)
