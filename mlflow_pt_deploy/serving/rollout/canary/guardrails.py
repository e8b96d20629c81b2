"""Whether a canary is worse than its champion: counts of two versions to a reason; pure.

The counts are those of the last seconds. They are looked at every second for days, so each test
has a level of one in a million: a good canary is practically never ended by chance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from mlflow_pt_deploy.evaluation.statistics import proportion
from mlflow_pt_deploy.serving.model.version_counts import (
    LATENCY_FROM_S,
    LATENCY_STEP,
    VersionCounts,
)
from mlflow_pt_deploy.serving.rollout.canary.limits import Limits

LEVEL = 1e-6
_Z = 4.753424308822899  # the standard normal's quantile at 1 - LEVEL
_MIN_ERRORS = 3
_MIN_ANSWERS = 20
_MIN_COMPARED = 40
_MIN_LABELLED = 100
# A champion without any traffic, beside a canary with all of it, counts as if it answered these.
_ASSUMED_REQUESTS = 100
# A canary computes on threads only, a fast champion on the event loop.
_LATENCY_FLOOR_S = 0.01


def broken(champion: VersionCounts, canary: VersionCounts, limits: Limits) -> str:
    """Why a canary must be ended; empty if it may go on.

    Args:
        champion: Counts of the champion.
        canary: Counts of the canary in the same time, its labels in the champion's order.
        limits: What is allowed.
    """
    return (
        _errors(champion, canary)
        or _latency(champion, canary, limits.p99_ratio)
        or _disagreement(canary, limits.disagreement)
        or _label_shift(champion, canary, limits.label_shift)
    )


def _errors(champion: VersionCounts, canary: VersionCounts) -> str:
    if canary.errors < _MIN_ERRORS:
        return ""
    # a request may be half counted, see `VersionCounts`
    requests = max(canary.requests, canary.errors)
    theirs = max(champion.requests, champion.errors) or _ASSUMED_REQUESTS
    if exact_p(champion.errors, theirs, canary.errors, requests) > LEVEL:
        return ""
    return (
        f"errors: {canary.errors} of {requests} requests, the champion had "
        f"{champion.errors} of {champion.requests}"
    )


def _latency(champion: VersionCounts, canary: VersionCounts, ratio: float) -> str:
    answers, theirs = sum(canary.seconds), sum(champion.seconds)
    if not ratio or min(answers, theirs) < _MIN_ANSWERS:
        return ""
    mine_s, champion_s = canary.quantile_s(0.99), champion.quantile_s(0.99)
    assert mine_s is not None and champion_s is not None
    limit_s = max(ratio * champion_s, champion_s + _LATENCY_FLOOR_S)
    slow, slow_theirs = _slower(canary, limit_s), _slower(champion, limit_s)
    if slow <= 0.01 * answers or exact_p(slow_theirs, theirs, slow, answers) > LEVEL:
        return ""
    return (
        f"latency: p99 {1000 * mine_s:.3g} ms in {answers} answers, the champion's is "
        f"{1000 * champion_s:.3g} ms; the limit is {1000 * limit_s:.3g} ms"
    )


def _disagreement(canary: VersionCounts, limit: float) -> str:
    compared, disagreed = canary.compared, canary.disagreed
    if not limit or compared < _MIN_COMPARED or proportion(disagreed, compared, _Z).low <= limit:
        return ""
    return (
        f"disagreement: {disagreed} of {compared} rows have another label than the champion gives; "
        f"the limit is {limit:.0%}"
    )


def _label_shift(champion: VersionCounts, canary: VersionCounts, limit: float) -> str:
    """Compare label shares, unless the versions agree on the same rows.

    Different shares are then the rows', not the version's: the customers of a share of keys may
    differ from the others.
    """
    # rows of one request are alike, so requests are counted
    mine = min(canary.rows, sum(canary.seconds))
    theirs = min(champion.rows, sum(champion.seconds))
    if not limit or min(mine, theirs) < _MIN_LABELLED:
        return ""
    first, second = _shares(champion.labels, canary.labels)
    if canary.compared >= _MIN_COMPARED:
        distance = sum(abs(p - q) for p, q in zip(first, second, strict=True)) / 2
        if proportion(canary.disagreed, canary.compared, _Z).high < distance:
            return ""
    found = stability_index(first, second)
    noise = (1 / mine + 1 / theirs) * chi_square_quantile(len(first) - 1)
    if found - noise <= limit:
        return ""
    return (
        f"labels: their shares differ from the champion's by a population stability index of "
        f"{found:.2f} (at least {found - noise:.2f}); the limit is {limit:g}"
    )


def exact_p(events: int, total: int, canary_events: int, canary_total: int) -> float:
    """One-sided p of Fisher's exact test that the canary's rate of events is not higher.

    Fisher, "The Design of Experiments", 1935: the tail of a hypergeometric distribution.

    Args:
        events, total: Of the champion.
        canary_events, canary_total: Of the canary.
    """
    both, every = events + canary_events, total + canary_total
    if canary_events * every <= both * canary_total:  # not above its share
        return 1.0
    tail = 0.0
    for count in range(canary_events, min(both, canary_total) + 1):
        term = math.exp(
            _log_choose(canary_total, count)
            + _log_choose(total, both - count)
            - _log_choose(every, both)
        )
        tail += term
        if term < 1e-9 * tail:  # terms fall above the mean
            break
    return tail


def stability_index(first: Sequence[float], second: Sequence[float]) -> float:
    """Population stability index: the sum of both Kullback-Leibler divergences."""
    return sum((p - q) * math.log(p / q) for p, q in zip(first, second, strict=True))


def chi_square_quantile(freedom: int) -> float:
    """Quantile of the chi-square distribution at 1 - `LEVEL`.

    Wilson & Hilferty, "The distribution of chi-square", PNAS 1931. An index of equal shares, times
    the harmonic sum of both sizes, has this distribution.
    """
    if freedom < 1:
        return 0.0
    part = 2 / (9 * freedom)
    return float(freedom * (1 - part + _Z * math.sqrt(part)) ** 3)


def _shares(first: Sequence[int], second: Sequence[int]) -> tuple[list[float], list[float]]:
    """Shares of the labels that either has, each drawn a little towards those of both together."""
    size = max(len(first), len(second))
    counts = [[*each, *[0] * (size - len(each))] for each in (first, second)]
    pooled = [sum(pair) for pair in zip(*counts, strict=True)]
    seen = [at for at, count in enumerate(pooled) if count]
    weight = len(seen) / 2 / sum(pooled)
    found = []
    for each in counts:
        total = sum(each) + len(seen) / 2
        found.append([(each[at] + weight * pooled[at]) / total for at in seen])
    return found[0], found[1]


def _slower(counts: VersionCounts, limit_s: float) -> int:
    """Answers in buckets that begin at a limit or above it."""
    return sum(
        count
        for bucket, count in enumerate(counts.seconds)
        if bucket and LATENCY_FROM_S * LATENCY_STEP ** (bucket - 1) >= limit_s
    )


def _log_choose(total: int, count: int) -> float:
    if not 0 <= count <= total:
        return -math.inf
    return math.lgamma(total + 1) - math.lgamma(count + 1) - math.lgamma(total - count + 1)
