"""Metrics of answered rows, computed when they are read from the counts of all workers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from mlflow_pt_deploy.evaluation.profile import LENGTH_BUCKETS, SCORE_BUCKETS
from mlflow_pt_deploy.serving.observability.metrics import RowSeries

MAX_LABELS = 50
"""Labels of a version with a series of their own; the others share ``other``."""

_VERSION = ("model", "version")
_SCORE_ENDS = [*(f"{at / SCORE_BUCKETS:g}" for at in range(1, SCORE_BUCKETS)), "+Inf"]
_LENGTH_ENDS = [*(f"{2**at - 1:.1f}" for at in range(LENGTH_BUCKETS - 1)), "+Inf"]


class RowCollector(Collector):
    """Exposes labels, scores, lengths, unknown tokens and drift.

    Args:
        series: Returns the answered rows of each version.
    """

    def __init__(self, series: Callable[[], Iterable[RowSeries]]) -> None:
        self._series = series

    def collect(self) -> Iterator[Metric]:
        """The metrics as they are now."""
        rows = CounterMetricFamily("pt_deploy_rows", "Rows answered", labels=(*_VERSION, "label"))
        scores = HistogramMetricFamily(
            "pt_deploy_score", "Score of the best label of a row", labels=_VERSION
        )
        lengths = HistogramMetricFamily("pt_deploy_row_tokens", "Tokens of a row", labels=_VERSION)
        unknown = CounterMetricFamily(
            "pt_deploy_unknown_tokens", "Tokens that the vocabulary lacks", labels=_VERSION
        )
        drift = {
            field: GaugeMetricFamily(
                f"pt_deploy_drift_{name}", about, labels=(*_VERSION, "kind", "window")
            )
            for field, name, about in (
                ("psi", "psi", "Population stability index against the validation rows"),
                ("low", "psi_low", "Lower end of its 95 % interval"),
                ("high", "psi_high", "Upper end of its 95 % interval"),
            )
        }
        for each in self._series():
            version = (each.model, each.version)
            counts = each.counts
            for label, count in _by_label(each).items():
                rows.add_metric((*version, label), count)
            scores.add_metric(version, _cumulative(_SCORE_ENDS, counts.scores), None)
            if counts.pieces:
                buckets = _cumulative(_LENGTH_ENDS, counts.lengths)
                lengths.add_metric(version, buckets, counts.pieces)
                unknown.add_metric(version, counts.unknown)
            for window, shifts in each.shifts.items():
                for shift in shifts:
                    for field, gauge in drift.items():
                        gauge.add_metric((*version, shift.kind, window), getattr(shift, field))
        yield from (rows, scores, lengths, unknown, *drift.values())


def _by_label(series: RowSeries) -> dict[str, int]:
    """Rows by label; those that were rare in the profile are added up as ``other``.

    The choice does not depend on what is served, so that a series never ends.
    """
    counts, names = series.counts.labels, series.labels
    order = sorted(range(len(names)), key=lambda at: -series.profile.get(at, 0))
    own = set(order[:MAX_LABELS])
    found: dict[str, int] = {}
    for at, count in enumerate(counts):
        name = names[at] if at in own else "other"
        found[name] = found.get(name, 0) + count
    return found


def _cumulative(ends: Sequence[str], counts: Sequence[int]) -> list[tuple[str, int]]:
    total, found = 0, []
    for end, count in zip(ends, counts, strict=True):
        total += count
        found.append((end, total))
    return found
