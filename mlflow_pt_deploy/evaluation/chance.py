"""Compare a classifier with a constant one that predicts the same label for every row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mlflow_pt_deploy.evaluation.statistics import paired_drop


def chance_note(
    targets: npt.NDArray[np.int64], predicted: npt.NDArray[np.int64], labels: Sequence[str]
) -> str:
    """Explain why a classifier is no better than always predicting the most frequent label.

    Args:
        targets: int64 (rows,), the true classes.
        predicted: int64 (rows,), the predicted classes.
        labels: Class names.

    Returns:
        Empty if the classifier is better by more than the 95 % interval of `paired_drop` and
        predicts more than one label, or if all rows are correct.
    """
    most_frequent = int(np.bincount(targets).argmax())
    accuracy = float(np.mean(predicted == targets))
    constant = float(np.mean(targets == most_frequent))
    comparison = f"always predicting {labels[most_frequent]!r} is correct for {constant:.1%}"
    if len(labels) > 1 and len(np.unique(predicted)) == 1:
        return (
            f"predicts {labels[int(predicted[0])]!r} for every validation row: it is correct for "
            f"{accuracy:.1%}; {comparison}"
        )
    loss = paired_drop(targets == most_frequent, predicted == targets)
    if loss.high < 0 or accuracy == 1:
        return ""
    verdict = "at chance level" if loss.value >= 0 else "no better than chance beyond noise"
    return (
        f"is {verdict}: it is correct for {accuracy:.1%} of {len(targets)} validation rows; "
        f"{comparison}"
    )
