"""Counts of a version: buckets, sums, quantiles."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from mlflow_pt_deploy.serving.model.version_counts import (
    LATENCY_BUCKETS,
    LATENCY_STEP,
    VersionCounts,
    total,
)


@pytest.mark.parametrize(
    ("status", "errors"), [(200, 0), (400, 0), (499, 0), (429, 1), (500, 1), (504, 1)]
)
def test_only_what_the_version_failed_is_its_error(status: int, errors: int) -> None:
    counts = VersionCounts()
    counts.count_response(status, 0.001)
    assert (counts.requests, counts.errors, sum(counts.seconds)) == (1, errors, status == 200)


def test_quantiles_are_exact_to_a_bucket() -> None:
    source = random.Random(0)
    taken = [source.lognormvariate(-6, 1) for _ in range(2000)]
    counts = VersionCounts()
    for seconds in taken:
        counts.count_response(200, seconds)
    for share in (0.5, 0.95, 0.99):
        exact = float(np.quantile(taken, share))
        found = counts.quantile_s(share)
        assert found is not None and exact / LATENCY_STEP <= found <= exact * LATENCY_STEP


def test_latencies_beyond_the_buckets() -> None:
    counts = VersionCounts()
    counts.count_response(200, 0.0)
    counts.count_response(200, 1e9)
    assert (counts.seconds[0], counts.seconds[LATENCY_BUCKETS - 1]) == (1, 1)
    assert VersionCounts().quantile_s(0.5) is None


def test_rows_are_counted_by_label_score_length_and_unknown_tokens() -> None:
    counts = VersionCounts(labels=[0, 0])
    counts.count_rows([(1, 0.51), (1, 1.0), (0, 0.0)], [[[5], [1, 1, 7]], [[]]], unknown_id=1)
    assert (counts.rows, counts.labels) == (3, [1, 2])
    assert (counts.scores[0], counts.scores[10], counts.scores[19]) == (1, 1, 1)
    assert counts.lengths[:3] == [1, 1, 1]
    assert (counts.pieces, counts.unknown) == (4, 2)


def test_counts_add_up_and_survive_json() -> None:
    first, second = VersionCounts(labels=[1]), VersionCounts(labels=[2, 3])
    first.count_response(200, 0.01)
    first.disagreed = 2
    both = total([first, second])
    assert (both.labels, both.requests, both.disagreed) == ([3, 3], 1, 2)
    assert VersionCounts.from_json(json.loads(json.dumps(both.to_json()))) == both
    assert both.plus(second, -1).plus(first, -1).labels == [0, 0]
    assert VersionCounts.from_json({"rows": 3, "later": 1}).rows == 3
