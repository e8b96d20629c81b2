"""Text augmentation: new unlabeled texts made from the training rows, for a teacher to label.

Word dropping and n-gram sampling follow Tang et al. (2019), who distilled BERT into a BiLSTM with
them; splicing two rows follows their sentence pairs. The texts need not make sense, because they
are only used with the labels of the teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

_DROP_SHARE = (0.1, 0.4)  # range of the share of words to drop
_MIN_WORDS = 2
_TRIES_PER_TEXT = 4

Words = list[str]


def make_texts(rows: Sequence[str], count: int, *, seed: int = 0) -> tuple[str, ...]:
    """Make augmented texts: word dropout, n-gram sampling and splicing, a third each.

    Args:
        rows: Source texts.
        count: Number of texts. Fewer are returned if the rows are too few or too short.
        seed: Random seed; the same seed gives the same texts.

    Returns:
        Texts that differ from each other and from `rows`.
    """
    random = np.random.default_rng(seed)
    words = [row.split() for row in rows]
    words = [each for each in words if len(each) >= _MIN_WORDS]
    if not words:
        return ()
    seen = {" ".join(each) for each in words}
    texts: list[str] = []
    for _ in range(_TRIES_PER_TEXT * count):
        if len(texts) == count:
            break
        augment = _METHODS[random.integers(len(_METHODS))]
        first, second = (words[random.integers(len(words))] for _ in range(2))
        text = " ".join(augment(first, second, random))
        if text and text not in seen:
            seen.add(text)
            texts.append(text)
    return tuple(texts)


def _drop_words(first: Words, second: Words, random: np.random.Generator) -> Words:
    keep = random.random(len(first)) >= random.uniform(*_DROP_SHARE)
    return [word for word, kept in zip(first, keep, strict=True) if kept]


def _sample_ngram(first: Words, second: Words, random: np.random.Generator) -> Words:
    length = int(random.integers(_MIN_WORDS, len(first) + 1))
    start = int(random.integers(len(first) - length + 1))
    return first[start : start + length]


def _splice(first: Words, second: Words, random: np.random.Generator) -> Words:
    """Join the beginning of one text and the end of another."""
    return first[: random.integers(1, len(first) + 1)] + second[random.integers(len(second)) :]


_METHODS: tuple[Callable[[Words, Words, np.random.Generator], Words], ...] = (
    _drop_words,
    _sample_ngram,
    _splice,
)
