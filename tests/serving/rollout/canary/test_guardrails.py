"""Guardrails: a good canary goes on, each fault is found, few samples are no reason."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from scipy import stats

from mlflow_pt_deploy.evaluation.statistics import proportion
from mlflow_pt_deploy.serving.model.version_counts import (
    LATENCY_BUCKETS,
    LATENCY_FROM_S,
    LATENCY_STEP,
    VersionCounts,
)
from mlflow_pt_deploy.serving.rollout.canary.guardrails import (
    LEVEL,
    broken,
    chi_square_quantile,
    exact_p,
)
from mlflow_pt_deploy.serving.rollout.canary.limits import Limits

WINDOWS = 1000
LIMITS = Limits()
NO_LIMITS = Limits(0, 0, 0)


class Traffic:
    """A champion with 95 % of random traffic and a canary with 5 %, which is as good."""

    def __init__(self, seed: int) -> None:
        draw = self.draw = np.random.default_rng(seed)
        self.requests = round(10 ** draw.uniform(1, 4.5))
        self.error_rate = draw.choice([0.0, 0.001, 0.02, 0.3])
        self.disagreement = draw.uniform(0, 0.08)
        self.median_s = 10 ** draw.uniform(-4, -1)
        labels = draw.choice([2, 3, 20, 77])
        self.shares = draw.dirichlet(np.full(labels, draw.choice([0.3, 1.0, 10.0])))

    def of(self, share: float, **faults: float) -> VersionCounts:
        draw = self.draw
        counts = VersionCounts()
        counts.requests = draw.binomial(self.requests, share)
        counts.errors = draw.binomial(counts.requests, faults.get("error_rate", self.error_rate))
        answers = min(counts.requests - counts.errors, 2000)
        seconds = faults.get("slower", 1) * self.median_s * draw.lognormal(0, 0.5, answers)
        buckets = np.ceil(np.log(seconds / LATENCY_FROM_S) / np.log(LATENCY_STEP))
        inside = buckets.clip(0, LATENCY_BUCKETS - 1).astype(int)
        counts.seconds = np.bincount(inside, minlength=LATENCY_BUCKETS).tolist()
        rows = sum(counts.seconds)
        counts.rows = rows
        counts.labels = draw.multinomial(rows, self.shares).tolist()
        counts.compared = min(rows, 600)
        counts.disagreed = draw.binomial(
            counts.compared, faults.get("disagreement", self.disagreement)
        )
        return counts


def test_a_good_canary_is_not_ended() -> None:
    for seed in range(WINDOWS):
        traffic = Traffic(seed)
        share = traffic.draw.choice([0.01, 0.05, 0.2, 0.5])
        champion, canary = traffic.of(1 - share), traffic.of(share)
        assert broken(champion, canary, LIMITS) == "", (seed, traffic.requests, share)


def busy(**faults: float) -> tuple[VersionCounts, VersionCounts]:
    """Thirty seconds of 100 requests a second, 5 % of them to the canary."""
    traffic = Traffic(1)
    traffic.requests, traffic.error_rate, traffic.disagreement = 3000, 0.001, 0.02
    traffic.shares, traffic.median_s = np.array([0.5, 0.3, 0.2]), 0.02
    return traffic.of(0.95), traffic.of(0.05, **faults)


@pytest.mark.parametrize(
    ("faults", "reason"),
    [
        ({"error_rate": 0.2}, r"errors: \d+ of \d+ requests, the champion had \d+ of \d+"),
        ({"slower": 10}, r"latency: p99 .* ms in \d+ answers, the champion's is .* the limit is"),
        ({"disagreement": 0.4}, r"disagreement: \d+ of \d+ rows .* the limit is 10%"),
    ],
)
def test_each_fault_is_found(faults: dict[str, float], reason: str) -> None:
    champion, canary = busy(**faults)
    assert broken(champion, canary, NO_LIMITS) == "" or "error_rate" in faults
    found = broken(champion, canary, LIMITS)
    assert re.match(reason, found), found


def test_another_mix_of_labels_is_found_unless_the_same_rows_get_the_same_labels() -> None:
    champion, canary = busy()
    canary.labels, canary.compared, canary.disagreed = [0, 0, sum(canary.labels)], 0, 0
    assert "labels: their shares differ" in broken(champion, canary, LIMITS)
    canary.compared, canary.disagreed = 100, 3
    assert broken(champion, canary, LIMITS) == ""


def test_rows_of_one_request_count_once() -> None:
    champion, canary = busy()
    canary.seconds = VersionCounts().seconds
    for _ in range(30):
        canary.count_response(200, 0.02)
    canary.rows, canary.labels, canary.compared = 5000, [0, 0, 5000], 0
    assert broken(champion, canary, LIMITS) == ""


def test_few_samples_are_no_reason() -> None:
    champion, _ = busy()
    assert broken(champion, VersionCounts(requests=2, errors=2), LIMITS) == ""
    assert "errors: 4 of 4" in broken(champion, VersionCounts(requests=4, errors=4), LIMITS)
    assert broken(champion, VersionCounts(compared=30, disagreed=30), LIMITS) == ""
    slow = VersionCounts()
    for _ in range(19):
        slow.count_response(200, 10.0)
    assert broken(champion, slow, LIMITS) == ""


def test_a_fraction_of_a_millisecond_is_no_reason() -> None:
    champion, canary = VersionCounts(), VersionCounts()
    for _ in range(1000):
        champion.count_response(200, 0.0001)
        canary.count_response(200, 0.0005)
    assert broken(champion, canary, LIMITS) == ""


def test_a_canary_with_all_requests_is_ended_for_errors() -> None:
    assert "the champion had 0 of 0" in broken(
        VersionCounts(), VersionCounts(requests=100, errors=50), LIMITS
    )


@pytest.mark.parametrize(
    ("champion", "canary"), [((0, 57), (3, 3)), ((5, 1000), (6, 50)), ((900, 9000), (90, 500))]
)
def test_p_is_that_of_scipy(champion: tuple[int, int], canary: tuple[int, int]) -> None:
    table = [[each[0], each[1] - each[0]] for each in (canary, champion)]
    exact = stats.fisher_exact(table, alternative="greater").pvalue
    assert exact_p(*champion, *canary) == pytest.approx(exact, rel=1e-6)


def test_a_lower_rate_is_no_evidence() -> None:
    assert exact_p(10, 100, 1, 100) == 1.0
    assert exact_p(0, 100, 0, 0) == 1.0


def test_bounds_are_those_of_scipy() -> None:
    low = stats.binomtest(30, 100).proportion_ci(0.95, "wilson").low
    assert proportion(30, 100, stats.norm.ppf(0.975)).low == pytest.approx(low, rel=1e-6)
    for freedom in (1, 2, 19, 76):
        exact = stats.chi2.isf(LEVEL, freedom)
        assert 0.99 * exact < chi_square_quantile(freedom) < 1.16 * exact
    assert math.isclose(chi_square_quantile(0), 0)
