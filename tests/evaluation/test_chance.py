"""Comparison of a classifier with a constant one."""

from __future__ import annotations

import numpy as np
import pytest

from mlflow_pt_deploy.evaluation.chance import chance_note

LABELS = ("card", "refund")


def rows(*counts: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return targets and predictions from (target, prediction, count)."""
    targets = np.concatenate([np.full(count, target) for target, _, count in counts])
    return targets, np.concatenate([np.full(count, predicted) for _, predicted, count in counts])


@pytest.mark.parametrize(
    ("counts", "note"),
    [
        ([(0, 0, 45), (1, 1, 40), (1, 0, 5)], ""),
        ([(0, 0, 1), (1, 1, 99)], ""),  # all correct, one label is rare
        (
            [(0, 0, 60), (1, 0, 40)],
            "predicts 'card' for every validation row: it is correct for 60.0%; always predicting "
            "'card' is correct for 60.0%",
        ),
        (
            [(0, 1, 60), (1, 1, 40)],
            "predicts 'refund' for every validation row: it is correct for 40.0%; always "
            "predicting 'card' is correct for 60.0%",
        ),
        (
            [(0, 0, 30), (0, 1, 30), (1, 1, 25), (1, 0, 15)],
            "is at chance level: it is correct for 55.0% of 100 validation rows; always predicting "
            "'card' is correct for 60.0%",
        ),
        # Better, but not beyond noise; with ten times the rows it is beyond noise.
        (
            [(0, 0, 58), (0, 1, 2), (1, 1, 5), (1, 0, 35)],
            "is no better than chance beyond noise: it is correct for 63.0% of 100 validation "
            "rows; always predicting 'card' is correct for 60.0%",
        ),
        ([(0, 0, 580), (0, 1, 20), (1, 1, 50), (1, 0, 350)], ""),
        ([(0, 0, 4), (1, 1, 4)], ""),
    ],
)
def test_the_note_of_a_model_at_chance_level(counts: list[tuple[int, int, int]], note: str) -> None:
    targets, predicted = rows(*counts)
    assert chance_note(targets, predicted, LABELS) == note
