"""Quality of a variant: its labels compared with the targets and with those of the baseline."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from mlflow_pt_deploy.data.splits import Split, Splits
from mlflow_pt_deploy.evaluation.result import UNITS, Measurement
from mlflow_pt_deploy.evaluation.statistics import (
    calibration_error,
    lowest_recall,
    macro_f1,
    mcnemar_p,
    paired_drop,
    paired_ratio,
    proportion,
)
from mlflow_pt_deploy.evaluation.worker_client import Predictions

Labels = npt.NDArray[np.int64]


def quality(
    predictions: Mapping[str, Predictions], splits: Splits, reference: Mapping[str, Labels]
) -> list[Measurement]:
    """Measure accuracy and calibration on `validation` and `test`.

    Args:
        predictions: Of the variant, by dataset.
        splits: Targets of the rows.
        reference: Labels of the baseline, by dataset.
    """
    found: list[Measurement] = []
    for dataset in ("validation", "test"):
        labels, confidence = predictions[dataset]
        split: Split = getattr(splits, dataset)
        if len(split):
            found += _scores(dataset, split.targets, labels, reference[dataset])
            error = calibration_error(confidence, labels == split.targets)
            found.append(measurement("calibration_error", error, dataset))
            samples = tuple(round(value, 6) for value in confidence.tolist())
            mean = float(confidence.mean())
            found.append(Measurement("confidence", mean, "fraction", dataset, samples=samples))
    return found


def perturbed_agreement(
    labels: Labels, reference: Labels, rows: Mapping[str, int]
) -> list[Measurement]:
    """Measure agreement with the baseline on perturbed rows: of all, and of each kind.

    Args:
        labels: Of the variant.
        reference: Of the baseline.
        rows: Number of rows of each kind, in their order.
    """
    equal = labels == reference
    ends = list(accumulate(rows.values()))
    parts = zip(rows, np.split(equal, ends[:-1]), strict=True)
    return [
        Measurement("agreement_perturbed", share, "fraction", kind, low, high)
        for kind, part in (("", equal), *parts)
        for share, low, high in [proportion(int(part.sum()), len(part))]
    ]


def measurement(name: str, value: float, dataset: str = "") -> Measurement:
    """Return a measurement with the unit of its metric."""
    return Measurement(name, float(value), UNITS[name], dataset)


def _scores(
    dataset: str,
    targets: Labels,
    predicted: Labels,
    reference: Labels,
) -> list[Measurement]:
    correct, expected = predicted == targets, reference == targets
    drop, low, high = paired_drop(expected, correct)
    kept, kept_low = paired_ratio(expected, correct)
    samples = tuple(map(float, correct))
    return [
        Measurement("accuracy", float(correct.mean()), "fraction", dataset, samples=samples),
        measurement("macro_f1", macro_f1(targets, predicted), dataset),
        measurement("agreement", float((predicted == reference).mean()), dataset),
        Measurement("accuracy_drop", drop, "fraction", dataset, low, high),
        Measurement("accuracy_kept", kept, "fraction", dataset, kept_low),
        measurement("mcnemar_p", mcnemar_p(expected, correct), dataset),
        measurement("class_recall", lowest_recall(targets, predicted), dataset),
    ]
