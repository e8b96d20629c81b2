"""Contributions of words by leaving each out, for any model that only predicts.

The value of a word is how much the logit falls without its tokens (occlusion, Zeiler & Fergus 2014;
representation erasure, Li et al. 2016). Words that matter only together get values that do not sum
to the logit; the remainder is stated as the delta.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from mlflow_pt_deploy.explanation.result import Attribution, above_mean
from mlflow_pt_deploy.explanation.words import Word
from mlflow_pt_deploy.runtimes.base import Logits

METHOD = "occlusion"

MAX_PARTS = 64
"""Most parts of a text; in a longer one several adjacent words are left out together."""

Score = Callable[[Sequence[Sequence[int]]], Logits]
"""Maps rows of token ids to logits, float32 (rows, classes)."""


def attribute_by_occlusion(
    score: Score, ids: Sequence[int], empty: Sequence[int], words: Sequence[Word], label: int
) -> Attribution:
    """Compute the logit of a text, of an empty text, and of the text without each part.

    Args:
        score: The model.
        ids: Token ids of the text.
        empty: Token ids of an empty text; its logit is the base.
        words: Words of the text.
        label: Index of the explained label.
    """
    parts = group_words(words)
    rows = [ids, empty, *(_without(ids, part) or empty for part in parts)]
    logits = above_mean(score(rows).astype(np.float64), label)
    return Attribution(METHOD, float(logits[0]), float(logits[1]), parts, logits[0] - logits[2:])


def group_words(words: Sequence[Word]) -> list[Word]:
    """Adjacent words as at most `MAX_PARTS` parts of equal numbers of words."""
    size = math.ceil(len(words) / MAX_PARTS) or 1
    groups = (words[start : start + size] for start in range(0, len(words), size))
    return [
        Word(group[0].start, group[-1].end, tuple(at for word in group for at in word.pieces))
        for group in groups
    ]


def _without(ids: Sequence[int], part: Word) -> list[int]:
    left_out = set(part.pieces)
    return [piece for at, piece in enumerate(ids) if at not in left_out]
