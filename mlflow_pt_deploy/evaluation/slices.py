"""Accuracy of a variant on slices of the rows: by class, and by length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mlflow_pt_deploy.data.splits import Split
from mlflow_pt_deploy.evaluation.statistics import paired_drop

_LENGTH_PARTS = 4


class Slice(NamedTuple):
    """Accuracy on a part of the rows.

    Attributes:
        name: ``class NAME`` or ``SHORTEST to LONGEST characters``.
        rows: Number of rows.
        baseline: Accuracy of the baseline.
        accuracy: Accuracy of the variant.
        drop, low, high: Baseline minus variant, with the paired 95 % interval.
    """

    name: str
    rows: int
    baseline: float
    accuracy: float
    drop: float
    low: float
    high: float


class Change(NamedTuple):
    """A row to which the variant gives another label than the baseline.

    Attributes:
        row: Index of the row in its split.
        text: The row; empty for an image.
        target: The true label.
        baseline: Label of the baseline.
        variant: Label of the variant.
    """

    row: int
    text: str
    target: str
    baseline: str
    variant: str


def slice_accuracy(
    split: Split,
    labels: Sequence[str],
    reference: Sequence[int],
    predicted: Sequence[int],
) -> list[Slice]:
    """Compare a variant with the baseline by class, and by quarters of the length of texts.

    Args:
        split: Rows with targets.
        labels: Names of the classes.
        reference: Predicted class of each row by the baseline.
        predicted: Predicted class of each row by the variant.

    Returns:
        Classes first, those with the largest drop first; then lengths, the shortest first.
    """
    right, expected = _correct(split, predicted), _correct(split, reference)
    classes = [
        _slice(f"class {name}", split.targets == index, expected, right)
        for index, name in enumerate(labels)
        if (split.targets == index).any()
    ]
    classes.sort(key=lambda each: -each.drop)
    return [*classes, *_by_length(split, expected, right)]


def changed_rows(
    split: Split, labels: Sequence[str], reference: Sequence[int], predicted: Sequence[int]
) -> list[Change]:
    """Rows to which a variant gives another label than the baseline; arguments as above."""
    return [
        Change(
            row,
            text if isinstance(text := split.rows[row], str) else "",
            labels[int(split.targets[row])],
            labels[before],
            labels[after],
        )
        for row, (before, after) in enumerate(zip(reference, predicted, strict=True))
        if before != after
    ]


def _by_length(
    split: Split, expected: npt.NDArray[np.bool_], right: npt.NDArray[np.bool_]
) -> Iterator[Slice]:
    if not split.rows or not isinstance(split.rows[0], str):
        return
    lengths = np.array([len(row) for row in split.rows])
    for part in np.array_split(np.argsort(lengths, kind="stable"), _LENGTH_PARTS):
        if len(part):
            inside = np.zeros(len(lengths), dtype=bool)
            inside[part] = True
            name = f"{lengths[part].min()} to {lengths[part].max()} characters"
            yield _slice(name, inside, expected, right)


def _slice(
    name: str,
    inside: npt.NDArray[np.bool_],
    expected: npt.NDArray[np.bool_],
    right: npt.NDArray[np.bool_],
) -> Slice:
    drop = paired_drop(expected[inside], right[inside])
    return Slice(
        name,
        int(inside.sum()),
        float(expected[inside].mean()),
        float(right[inside].mean()),
        *drop,
    )


def _correct(split: Split, predicted: Sequence[int]) -> npt.NDArray[np.bool_]:
    correct: npt.NDArray[np.bool_] = np.asarray(predicted) == split.targets
    return correct
