"""Counts of what one version answered: numbers only, no rows, and those of all workers add up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mlflow_pt_deploy.evaluation.profile import RowCounts

LATENCY_STEP = 1.25
LATENCY_FROM_S = 50e-6
LATENCY_BUCKETS = 64
"""Bucket i of the latencies ends at ``LATENCY_FROM_S * LATENCY_STEP**i``; the last one is open."""

_LOG_STEP = math.log(LATENCY_STEP)


@dataclass(slots=True)
class VersionCounts(RowCounts):
    """Counts of one version since the server started; those of its rows: see `RowCounts`.

    Written by the event loop, read by the monitor's thread: a reader may see a request half
    counted, never a number that shrinks.

    Attributes:
        requests: Scoring requests that this version was asked.
        errors: Those that it did not answer with 200 for a reason of its own (status 5xx, 429).
        seconds: Latencies of its answers by bucket.
        compared: Rows that another version answered too.
        disagreed: Those with another label.
        judged: Rows with a label that was sent as feedback.
        correct: Those whose label was the one answered.
    """

    requests: int = 0
    errors: int = 0
    seconds: list[int] = field(default_factory=lambda: [0] * LATENCY_BUCKETS)
    compared: int = 0
    disagreed: int = 0
    judged: int = 0
    correct: int = 0

    def count_response(self, status: int, seconds: float) -> None:
        """Count a response of this version.

        Args:
            status: HTTP status.
            seconds: Headers read to response sent.
        """
        self.requests += 1
        if status == 200:
            bucket = math.ceil(math.log(max(seconds, LATENCY_FROM_S) / LATENCY_FROM_S) / _LOG_STEP)
            self.seconds[min(bucket, LATENCY_BUCKETS - 1)] += 1
        elif status >= 500 or status == 429:
            self.errors += 1

    def quantile_s(self, share: float) -> float | None:
        """Seconds below which this share of the answers took; None if there is no answer.

        Exact to the width of a bucket, 25 %.
        """
        total = sum(self.seconds)
        if not total:
            return None
        below = 0
        for bucket, count in enumerate(self.seconds):
            below += count
            if below >= share * total:
                return float(LATENCY_FROM_S * LATENCY_STEP**bucket)
        raise AssertionError("unreachable")

    def summary(self) -> dict[str, Any]:
        """The counts that compare two versions; the p99 latency in milliseconds."""
        p99_s = self.quantile_s(0.99)
        counts = ("requests", "errors", "rows", "compared", "disagreed")
        return {
            **{name: getattr(self, name) for name in counts},
            "latency_p99_ms": None if p99_s is None else round(1000 * p99_s, 3),
        }


def total(parts: Sequence[VersionCounts]) -> VersionCounts:
    """The sum of counts."""
    found = VersionCounts()
    for part in parts:
        found = found.plus(part)
    return found
