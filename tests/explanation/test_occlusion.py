"""Occlusion on models that only predict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tiny.serving import TinyVariant, tiny_images, tiny_variant

from mlflow_pt_deploy.errors import UnsupportedError, VariantError
from mlflow_pt_deploy.explanation.explainer import Explainer
from mlflow_pt_deploy.explanation.occlusion import MAX_PARTS, group_words
from mlflow_pt_deploy.explanation.words import Word
from mlflow_pt_deploy.runtimes.base import Inputs, Logits

OWN, OTHER = 0.666667, -0.333333


def explain(text: str, label: str, variant: TinyVariant | None = None) -> dict[str, Any]:
    variant = variant or tiny_variant()

    def score(rows: Sequence[Sequence[int]]) -> Logits:
        return np.asarray(variant.predict(variant.preprocessor.collate(rows)))

    return Explainer(variant).explain(text, label, score)  # type: ignore[arg-type]


def values(found: dict[str, Any], text: str) -> list[tuple[str, float]]:
    return [(text[at["start"] : at["end"]], at["value"]) for at in found["contributions"]]


def test_the_word_red_makes_red() -> None:
    """A word adds 1 to the logit of its label, and so 1/3 to the mean of the three labels."""
    text = "one red, and 😀 red green"
    found = explain(text, "red")
    others = [("one", 0), (",", 0), ("and", 0), ("😀", 0)]
    words = values(found, text)
    assert [each for each in words if each[1] == 0] == others
    assert words[1] == words[5] == ("red", OWN)
    assert words[6] == ("green", OTHER)
    assert (found["logit"], found["base"], found["delta"]) == (1, 0, 0)
    assert (found["method"], found["label"], found["truncated"]) == ("occlusion", "red", False)
    assert values(explain(text, "green"), text)[-1] == ("green", OWN)


@pytest.mark.parametrize("text", ["", "  "])
def test_a_text_without_words_is_its_base(text: str) -> None:
    found = explain(text, "red")
    assert found["contributions"] == []
    assert found["logit"] == found["base"] == 0


def test_the_only_word_leaves_an_empty_text() -> None:
    assert values(explain("red", "red"), "red") == [("red", OWN)]


def test_words_that_only_matter_together_leave_a_delta() -> None:
    def both(inputs: Inputs) -> Logits:
        ids = inputs["input_ids"]
        found = (ids == 2).any(1) & (ids == 3).any(1)
        return np.stack([3 * found, ~found, ~found], axis=1).astype(np.float32)

    found = explain("red green", "red", replace(tiny_variant(), predict=both))
    # logits 3, 0, 0 with both words; 0, 1, 1 without either
    assert [each["value"] for each in found["contributions"]] == [2 + OWN, 2 + OWN]
    assert (found["logit"], found["base"], found["delta"]) == (2, -OWN, -2 - OWN)


def test_a_truncated_text_says_so() -> None:
    text = "red " * 100
    found = explain(text, "red")
    assert found["truncated"]
    assert (found["logit"], len(found["contributions"])) == (pytest.approx(64 * 2 / 3), 64)
    assert found["contributions"][-1]["end"] == 255


@pytest.mark.parametrize("count", [0, 1, MAX_PARTS, MAX_PARTS + 1, 5 * MAX_PARTS + 1])
def test_long_texts_have_parts_of_several_words(count: int) -> None:
    words = [Word(2 * at, 2 * at + 1, (at,)) for at in range(count)]
    parts = group_words(words)
    assert len(parts) <= MAX_PARTS
    assert [piece for part in parts for piece in part.pieces] == list(range(count))
    assert {len(part.pieces) for part in parts[:-1]} <= {math.ceil(count / MAX_PARTS)}
    if count:
        assert (parts[0].start, parts[-1].end) == (0, 2 * count - 1)


def test_values_that_are_not_finite_are_an_error() -> None:
    with pytest.raises(VariantError, match="not finite"):
        explain("red nan", "red")


def test_images_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="for texts; this model reads images"):
        explain("red", "red", tiny_images())
