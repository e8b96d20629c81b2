"""Statistics for benchmarks and classifiers: pure functions over numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_Z95 = 1.959963984540054  # the standard normal's 97.5 % quantile


class Estimate(NamedTuple):
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float


def percentile(samples: Sequence[float], q: float) -> float:
    """Return the `q`-th percentile of the samples.

    Linear between order statistics: definition 7 of Hyndman & Fan, "Sample quantiles in
    statistical packages" (The American Statistician, 1996).

    Args:
        samples: At least one sample.
        q: 0 to 100.
    """
    return float(np.percentile(np.asarray(samples, dtype=np.float64), q))


def paired_speedup(ratios: Sequence[float], *, resamples: int = 4000, seed: int = 0) -> Estimate:
    """Return the median of per-round ratios with a bootstrap 95 % interval over the rounds.

    A round times the same rows on both sides within a fraction of a second, so a slowdown of the
    machine affects both sides and cancels in the ratio. The unit of resampling is the round (the
    outermost repetition, after Kalibera & Jones, "Rigorous benchmarking in reasonable time",
    ISMM 2013); the interval is Efron's percentile bootstrap (Annals of Statistics, 1979). The
    median is robust against outlier rounds.

    Args:
        ratios: Baseline time divided by variant time, one per round. Use at least five (the range
            of five values covers the median with probability 94 %).
        resamples: Number of bootstrap samples.
        seed: Random seed; the same ratios give the same interval.
    """
    rounds = np.asarray(ratios, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(len(rounds), size=(resamples, len(rounds)))
    medians = np.median(rounds[picks], axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return Estimate(float(np.median(rounds)), float(low), float(high))


def paired_drop(
    reference_correct: npt.NDArray[np.bool_], variant_correct: npt.NDArray[np.bool_]
) -> Estimate:
    """Return the accuracy loss of a variant on the same rows with a paired 95 % interval.

    Only rows on which exactly one of the two is correct contribute. The interval adds half a row
    to each cell of the 2 x 2 table (Agresti & Min, "Simple improved confidence intervals for
    comparing matched proportions", Statistics in Medicine 2005), so the interval of two models
    that agree on all rows is not empty. The value itself is not adjusted.

    Args:
        reference_correct: bool (rows,), rows that the reference predicts correctly.
        variant_correct: bool (rows,), rows that the variant predicts correctly.

    Returns:
        Accuracy of the reference minus that of the variant, as a fraction; positive means the
        variant is worse.
    """
    rows = len(reference_correct)
    losses = int(np.sum(reference_correct & ~variant_correct))
    gains = int(np.sum(variant_correct & ~reference_correct))
    total, differing, net = rows + 2, losses + gains + 1, losses - gains
    center = net / total
    half = _Z95 * float(np.sqrt(differing - net**2 / total)) / total
    return Estimate(net / rows, max(center - half, -1.0), min(center + half, 1.0))


def macro_f1(targets: npt.NDArray[np.int64], predicted: npt.NDArray[np.int64]) -> float:
    """Return the mean over the classes of F1 = 2 TP / (2 TP + FP + FN).

    Includes classes that occur in the targets or the predictions, as scikit-learn does.

    Args:
        targets: int64 (rows,), the true classes.
        predicted: int64 (rows,), the predicted classes.
    """
    size = int(max(targets.max(), predicted.max())) + 1
    hits = np.bincount(targets[targets == predicted], minlength=size)
    seen = np.bincount(targets, minlength=size) + np.bincount(predicted, minlength=size)
    present = seen > 0
    return float(np.mean(2 * hits[present] / seen[present]))
