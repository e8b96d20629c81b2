"""Whether a classifier has learned anything: compare it with one that gives every row one label.

Pure functions over labels. Knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mlflow_pt_deploy.measure.statistics import paired_drop


def chance_note(
    targets: npt.NDArray[np.int64], predicted: npt.NDArray[np.int64], labels: Sequence[str]
) -> str:
    """In words, why a classifier is no better than always giving the most frequent label.

    Args:
        targets: int64 (rows,), the true classes.
        predicted: int64 (rows,), the classes answered.
        labels: Names of the classes.

    Returns:
        Empty where it is better by more than the 95 % interval of `paired_drop` and gives more
        than one label, or is right on all rows.
    """
    common = int(np.bincount(targets).argmax())
    right, share = float(np.mean(predicted == targets)), float(np.mean(targets == common))
    always = f"always answering {labels[common]!r} is right on {share:.1%}"
    if len(labels) > 1 and len(np.unique(predicted)) == 1:
        return (
            f"answers every validation row with {labels[int(predicted[0])]!r}: it is right on "
            f"{right:.1%}; {always}"
        )
    behind = paired_drop(targets == common, predicted == targets)
    if behind.high < 0 or right == 1:
        return ""
    verdict = "at chance level" if behind.value >= 0 else "no better than chance beyond noise"
    return f"is {verdict}: it is right on {right:.1%} of {len(targets)} validation rows; {always}"
