"""Counts of what one version answered: numbers only, no rows, and those of all workers add up."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import chain
from typing import Any

from mlflow_pt_deploy.serving.batching.request import Encoded

LATENCY_STEP = 1.25
LATENCY_FROM_S = 50e-6
LATENCY_BUCKETS = 64
"""Bucket i of the latencies ends at ``LATENCY_FROM_S * LATENCY_STEP**i``; the last one is open."""

SCORE_BUCKETS = 20
"""Buckets of equal width from 0 to 1."""

LENGTH_BUCKETS = 16
"""Bucket i holds rows of 2**(i-1) to 2**i - 1 tokens."""

_LOG_STEP = math.log(LATENCY_STEP)


@dataclass(slots=True)
class VersionCounts:
    """Counts of one version since the server started.

    Written by the event loop, read by the monitor's thread: a reader may see a request half
    counted, never a number that shrinks.

    Attributes:
        requests: Scoring requests that this version was asked.
        errors: Those that it did not answer with 200 for a reason of its own (status 5xx, 429).
        seconds: Latencies of its answers by bucket.
        rows: Rows answered.
        labels: Those by best class.
        scores: Those by score of the best class, see `SCORE_BUCKETS`.
        lengths: Those by tokens, see `LENGTH_BUCKETS`; for images all zero.
        pieces: Tokens of these rows.
        unknown: Those that are the tokenizer's unknown token.
        compared: Rows that another version answered too.
        disagreed: Those with another label.
        judged: Rows with a label that was sent as feedback.
        correct: Those whose label was the one answered.
    """

    requests: int = 0
    errors: int = 0
    seconds: list[int] = field(default_factory=lambda: [0] * LATENCY_BUCKETS)
    rows: int = 0
    labels: list[int] = field(default_factory=list)
    scores: list[int] = field(default_factory=lambda: [0] * SCORE_BUCKETS)
    lengths: list[int] = field(default_factory=lambda: [0] * LENGTH_BUCKETS)
    pieces: int = 0
    unknown: int = 0
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

    def count_rows(
        self,
        best: Iterable[tuple[int, float]],
        encoded: Iterable[Iterable[Encoded]],
        unknown_id: int | None = None,
    ) -> None:
        """Count answered rows.

        Args:
            best: Best class and its score for each row.
            encoded: The rows of each request as token ids; empty for images.
            unknown_id: The tokenizer's unknown token, if there is one.
        """
        labels, scores, lengths = self.labels, self.scores, self.lengths
        for at, score in best:
            if at >= len(labels):
                labels.extend([0] * (at + 1 - len(labels)))
            labels[at] += 1
            scores[min(int(score * SCORE_BUCKETS), SCORE_BUCKETS - 1)] += 1
            self.rows += 1
        for ids in chain.from_iterable(encoded):
            tokens = len(ids)
            lengths[min(tokens.bit_length(), LENGTH_BUCKETS - 1)] += 1
            self.pieces += tokens
            if unknown_id is not None:
                self.unknown += ids.count(unknown_id)

    def plus(self, other: VersionCounts, sign: int = 1) -> VersionCounts:
        """The sum of both, or with `sign` -1 what came since `other`."""
        return VersionCounts(
            **{name: _add(getattr(self, name), getattr(other, name), sign) for name in FIELDS}
        )

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

    def to_json(self) -> dict[str, Any]:
        """All counts by name, for a JSON document."""
        return {name: getattr(self, name) for name in FIELDS}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> VersionCounts:
        """Counts from the output of `to_json`; missing ones are 0, unknown ones are dropped."""
        return cls(**{name: document[name] for name in FIELDS if name in document})


FIELDS = tuple(each.name for each in fields(VersionCounts))


def _add(mine: Any, others: Any, sign: int) -> Any:
    if isinstance(mine, int):
        return mine + sign * others
    longest = max(len(mine), len(others))
    return [
        (mine[at] if at < len(mine) else 0) + sign * (others[at] if at < len(others) else 0)
        for at in range(longest)
    ]


def total(parts: Sequence[VersionCounts]) -> VersionCounts:
    """The sum of counts."""
    found = VersionCounts()
    for part in parts:
        found = found.plus(part)
    return found
