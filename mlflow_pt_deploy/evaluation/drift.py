"""Whether served rows still look like those that decided a promotion; pure.

The measure is the population stability index (PSI) of two count vectors, the sum over buckets of
(p - q) ln(p / q). From equal distributions it is not 0 but about (buckets - 1)(1/n + 1/m), and
distributed as (1/n + 1/m) times a chi-square of buckets - 1 degrees of freedom (Yurdakul & Naranjo,
"Statistical properties of the population stability index", Journal of Risk Model Validation 2020).
That bias is subtracted, and the interval takes the same noise into account.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mlflow_pt_deploy.errors import ModelError
from mlflow_pt_deploy.evaluation.profile import Profile, same_classes
from mlflow_pt_deploy.evaluation.statistics import Estimate

SAME, MOVED, TOO_FEW = "same", "moved", "too few rows"

LIMIT = 0.1
"""PSI from which a distribution counts as moved; the convention of credit scoring."""

MIN_ROWS = 100
"""With fewer rows on one side nothing is concluded."""

_MIN_EXPECTED = 5  # rows of a bucket in the smaller sample; Cochran's rule
_Z95 = 1.959963984540054  # the standard normal's 97.5 % quantile
_STEPS = 30

_Floats = npt.NDArray[np.float64]


class Shift(NamedTuple):
    """How far one distribution has moved.

    Attributes:
        kind: ``labels``, ``scores``, ``lengths`` or ``unknown`` (share of unknown tokens).
        psi: Population stability index, without its bias.
        low, high: Its 95 % interval.
        verdict: `MOVED` if the interval is above `LIMIT`, `SAME` if it is below, else `TOO_FEW`.
        rows: Served rows.
    """

    kind: str
    psi: float
    low: float
    high: float
    verdict: str
    rows: int


def compare(profile: Profile, served: Profile) -> list[Shift]:
    """Compare served rows with the profile of a version, one kind after the other.

    Args:
        profile: Rows that decided the promotion.
        served: Rows answered since.

    Returns:
        One shift for each kind that the model has; empty if nothing was served.

    Raises:
        ModelError: They have different numbers of classes.
    """
    if profile.classes != served.classes:
        raise ModelError(
            f"the profile has {profile.classes} classes and the served rows have {served.classes}, "
            "so it is of another model. Promote the version again to write its profile."
        )
    if not served.rows:
        return []
    vectors = {
        "labels": same_classes(profile, served),
        "scores": (profile.scores, served.scores),
        "lengths": (profile.lengths, served.lengths),
        "unknown": (_unknown(profile), _unknown(served)),
    }
    return [
        _shift(kind, first, second, served.rows)
        for kind, (first, second) in vectors.items()
        if sum(first) and sum(second)
    ]


def overall(shifts: Sequence[Shift]) -> str:
    """The verdict of all kinds together: `MOVED` if one moved, `SAME` only if all are the same."""
    verdicts = {shift.verdict for shift in shifts}
    if MOVED in verdicts:
        return MOVED
    return SAME if verdicts == {SAME} else TOO_FEW


def stability_index(expected: Sequence[float], observed: Sequence[float]) -> Estimate:
    """Return the population stability index without its bias, with its 95 % interval.

    Adjacent buckets are merged until each can be expected to hold 5 rows of the smaller sample,
    and half a row is added to each. The variance is the delta method's for two multinomial samples,
    plus that of equal distributions. The index is then treated as a scaled chi-square of that mean
    and variance (Patnaik, Biometrika 1949; its quantiles after Wilson & Hilferty, PNAS 1931), and
    the interval holds the values that a test does not reject. Rows count as independent.

    Args:
        expected, observed: Rows by bucket, at least one row each.
    """
    first, second = _merged(np.asarray(expected, float), np.asarray(observed, float))
    n, m, buckets = first.sum(), second.sum(), len(first)
    p, q = ((each + 0.5) / (each.sum() + buckets / 2) for each in (first, second))
    index = float(((p - q) * np.log(p / q)).sum())
    noise = 1 / n + 1 / m
    bias = (buckets - 1) * noise
    variance = _variance(p, np.log(p / q) - q / p, n) + _variance(q, np.log(q / p) - p / q, m)
    slope = variance / index if index > 1e-9 else 4 * noise

    def distance(value: float, index: float) -> float:
        """How many standard deviations `index` is above what a true `value` gives."""
        mean = value + bias
        spread = 2 / 9 * (2 * bias * noise + slope * value) / (2 * mean**2)
        return float(((index / mean) ** (1 / 3) - 1 + spread) / spread**0.5)

    low = _root(lambda value: distance(value, index) - _Z95)
    # samples that are more alike than chance makes them do not narrow the interval
    high = _root(lambda value: distance(value, max(index, bias)) + _Z95)
    return Estimate(max(index - bias, 0.0), low, high)


def _shift(kind: str, first: Sequence[float], second: Sequence[float], rows: int) -> Shift:
    psi, low, high = stability_index(first, second)
    enough = min(sum(first), sum(second)) >= MIN_ROWS
    verdict = TOO_FEW
    if enough and low > LIMIT:
        verdict = MOVED
    elif enough and high <= LIMIT:
        verdict = SAME
    return Shift(kind, round(psi, 4), round(low, 4), round(high, 4), verdict, rows)


def _unknown(profile: Profile) -> tuple[float, float]:
    """Known and unknown tokens in units of rows, because tokens of a row are not independent."""
    if not profile.pieces:
        return 0.0, 0.0
    unknown = profile.rows * min(profile.unknown / profile.pieces, 1.0)
    return profile.rows - unknown, unknown


def _merged(first: _Floats, second: _Floats) -> tuple[_Floats, _Floats]:
    """Merge adjacent buckets with few rows in both samples together; at least two are left."""
    pooled = (first + second) / (first.sum() + second.sum())
    expected = pooled * min(first.sum(), second.sum())
    left = expected[::-1].cumsum()[::-1]
    starts, filled = [0], 0.0
    for bucket, rows in enumerate(expected):
        if filled >= _MIN_EXPECTED and left[bucket] >= _MIN_EXPECTED:
            starts.append(bucket)
            filled = 0.0
        filled += rows
    if len(starts) == 1:
        largest = int(expected.argmax())
        return tuple(  # type: ignore[return-value]  # two samples give two
            np.array([each[largest], each.sum() - each[largest]]) for each in (first, second)
        )
    return np.add.reduceat(first, starts), np.add.reduceat(second, starts)


def _variance(shares: _Floats, slopes: _Floats, rows: float) -> float:
    """Variance of a function of multinomial shares with these derivatives."""
    return float((shares * slopes**2).sum() - (shares * slopes).sum() ** 2) / rows


def _root(falling: Callable[[float], float]) -> float:
    """Where a falling function of a value from 0 on is 0; 0 if it is below everywhere."""
    if falling(0.0) <= 0:
        return 0.0
    low, high = 0.0, 1.0
    while falling(high) > 0:
        low, high = high, 2 * high
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > 0 else (low, middle)
    return high
