"""Statistics for benchmarks and classifiers: pure functions over numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_Z95 = 1.959963984540054  # the standard normal's 97.5 % quantile
_Z95_ONE_SIDED = 1.6448536269514722  # its 95 % quantile


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


def product(first: Estimate, second: Estimate) -> Estimate:
    """Return the product of two independent positive estimates.

    Its interval has, on the logarithmic scale, the root of the sum of the squared half widths.
    """
    value = first.value * second.value
    down, up = (
        float(np.hypot(*(np.log(each[side] / each.value) for each in (first, second))))
        for side in (1, 2)
    )
    return Estimate(value, value * float(np.exp(-down)), value * float(np.exp(up)))


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


def paired_ratio(
    reference_correct: npt.NDArray[np.bool_], variant_correct: npt.NDArray[np.bool_]
) -> tuple[float, float]:
    """Return the share of the reference's accuracy that a variant keeps, on the same rows.

    The lower bound is that of Fieller's theorem for a ratio of paired means (Fieller, "Some
    problems in interval estimation", JRSS B 1954), one-sided with 95 % confidence. As in
    `paired_drop`, half a row is added to each cell of the 2 x 2 table, so few rows never give
    certainty. The value itself is not adjusted.

    Args:
        reference_correct: bool (rows,), rows that the reference predicts correctly.
        variant_correct: bool (rows,), rows that the variant predicts correctly.

    Returns:
        Accuracy of the variant divided by that of the reference, and its lower bound; 1 and 0 if
        the reference predicts no row correctly.
    """
    rows = len(reference_correct) + 2
    both = float(np.sum(reference_correct & variant_correct)) + 0.5
    variant = (float(np.sum(variant_correct & ~reference_correct)) + 0.5 + both) / rows
    reference = (float(np.sum(reference_correct & ~variant_correct)) + 0.5 + both) / rows
    scale = _Z95_ONE_SIDED**2 / rows
    # (variant - ratio * reference)^2 = scale * variance of that difference, solved for the ratio
    square = reference**2 - scale * reference * (1 - reference)
    middle = variant * reference - scale * (both / rows - variant * reference)
    rest = variant**2 - scale * variant * (1 - variant)
    if not reference_correct.any():
        return 1.0, 0.0
    value = float(np.sum(variant_correct)) / float(np.sum(reference_correct))
    root = middle**2 - square * rest
    if square <= 0 or root < 0:  # the reference's accuracy does not differ from 0
        return value, 0.0
    return value, max((middle - root**0.5) / square, 0.0)


def mcnemar_p(
    reference_correct: npt.NDArray[np.bool_], variant_correct: npt.NDArray[np.bool_]
) -> float:
    """Return the two-sided p of McNemar's exact test that both are equally accurate.

    McNemar, "Note on the sampling error of the difference between correlated proportions"
    (Psychometrika, 1947); exact, by the binomial distribution of the rows on which they differ.

    Args:
        reference_correct: bool (rows,), rows that the reference predicts correctly.
        variant_correct: bool (rows,), rows that the variant predicts correctly.
    """
    from scipy.stats import binomtest  # type: ignore[import-untyped]

    losses = int(np.sum(reference_correct & ~variant_correct))
    gains = int(np.sum(variant_correct & ~reference_correct))
    if not losses + gains:
        return 1.0
    return float(binomtest(losses, losses + gains).pvalue)


def proportion(successes: int, total: int, z: float = _Z95) -> Estimate:
    """Return a proportion with Wilson's interval (Wilson, JASA 1927).

    Args:
        successes: Number of successes.
        total: At least 1.
        z: Standard deviations to each bound; the default gives 95 %.
    """
    share, square = successes / total, z**2
    center = (share + square / (2 * total)) / (1 + square / total)
    half = (
        z
        * float(np.sqrt(share * (1 - share) / total + square / (4 * total**2)))
        / (1 + square / total)
    )
    return Estimate(share, max(center - half, 0.0), min(center + half, 1.0))


def calibration_error(
    confidence: npt.NDArray[np.float32], correct: npt.NDArray[np.bool_], bins: int = 15
) -> float:
    """Return the expected calibration error over bins of equal width.

    Guo et al., "On calibration of modern neural networks" (ICML 2017): the mean difference between
    accuracy and confidence in a bin, weighted by the rows in it.

    Args:
        confidence: float32 (rows,), probability of the predicted class, 0 to 1.
        correct: bool (rows,).
        bins: Number of bins.
    """
    index = np.minimum((confidence.astype(np.float64) * bins).astype(np.int64), bins - 1)
    gaps = np.bincount(index, weights=correct - confidence.astype(np.float64), minlength=bins)
    return float(np.abs(gaps).sum() / len(correct))


def lowest_recall(
    targets: npt.NDArray[np.int64], predicted: npt.NDArray[np.int64], min_rows: int = 5
) -> float:
    """Return the lowest share of correct rows of a class.

    Args:
        targets: int64 (rows,), the true classes.
        predicted: int64 (rows,), the predicted classes.
        min_rows: Classes with fewer rows are left out, because their share is mostly chance. If
            there are no others, the share of all rows is returned.
    """
    counts = np.bincount(targets)
    hits = np.bincount(targets[targets == predicted], minlength=len(counts))
    large = counts >= min_rows
    if not large.any():
        return float(np.mean(targets == predicted))
    return float(np.min(hits[large] / counts[large]))


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
