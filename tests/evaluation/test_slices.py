"""Slices by class and by length, and rows with another label; worked out by hand."""

from __future__ import annotations

import numpy as np

from mlflow_pt_deploy.data.splits import Split
from mlflow_pt_deploy.evaluation.slices import changed_rows, slice_accuracy

ROWS = ("a", "bb", "ccc", "dddd", "eeeee", "ffffff", "ggggggg", "hhhhhhhh")
SPLIT = Split(ROWS, np.array([0, 0, 0, 0, 1, 1, 1, 1]))
LABELS = ("short", "long", "never")
BEFORE = (0, 0, 0, 0, 1, 1, 1, 0)
AFTER = (0, 0, 0, 0, 1, 1, 0, 1)


def test_classes_then_lengths() -> None:
    found = slice_accuracy(SPLIT, LABELS, BEFORE, (0, 0, 0, 0, 1, 0, 0, 1))
    assert [each.name for each in found] == [
        "class long",
        "class short",
        "1 to 2 characters",
        "3 to 4 characters",
        "5 to 6 characters",
        "7 to 8 characters",
    ]
    long = found[0]
    assert (long.rows, long.baseline, long.accuracy, long.drop) == (4, 0.75, 0.5, 0.25)
    assert long.low < 0.25 < long.high
    assert (found[4].baseline, found[4].accuracy) == (1.0, 0.5)


def test_rows_with_another_label() -> None:
    found = changed_rows(SPLIT, LABELS, BEFORE, AFTER)
    assert [tuple(each) for each in found] == [
        (6, "ggggggg", "long", "long", "short"),
        (7, "hhhhhhhh", "long", "short", "long"),
    ]


def test_images_have_no_lengths_and_no_text() -> None:
    images = Split(tuple(row.encode() for row in ROWS), SPLIT.targets)
    assert len(slice_accuracy(images, LABELS, BEFORE, AFTER)) == 2
    assert changed_rows(images, LABELS, BEFORE, AFTER)[0].text == ""
