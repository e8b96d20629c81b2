"""Metrics of rows: their number is bounded, and their buckets add up."""

from __future__ import annotations

import pytest

from mlflow_pt_deploy.evaluation.profile import RowCounts
from mlflow_pt_deploy.serving.observability.metrics import RowSeries

pytest.importorskip("prometheus_client")


def exposed(series: RowSeries) -> dict[tuple[str, ...], float]:
    """Samples by name and the value of their last label."""
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.parser import text_string_to_metric_families

    from mlflow_pt_deploy.serving.observability.row_metrics import RowCollector

    registry = CollectorRegistry()
    registry.register(RowCollector(lambda: [series]))
    samples = [
        sample
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
    ]
    found = {
        (
            sample.name.removeprefix("pt_deploy_"),
            sample.labels.get("label", sample.labels.get("le", "")),
        ): sample.value
        for sample in samples
    }
    assert len(found) == len(samples)
    return found


def test_the_labels_of_many_classes_share_one_series() -> None:
    names = [*(f"class {at}" for at in range(98)), "other", "last"]
    counts = RowCounts(rows=100, labels=[1] * 100)
    found = exposed(RowSeries("a", "1", names, {98: 7, 99: 9}, counts, {}, ""))
    rows = {label: value for (name, label), value in found.items() if name == "rows_total"}
    # a class with this name too: its rows are among them
    assert (len(rows), sum(rows.values()), rows["other"], rows["last"]) == (50, 100, 51, 1)


def test_buckets_are_cumulative() -> None:
    counts = RowCounts(labels=[0])
    counts.count_rows([(0, 0.52), (0, 0.97)], [[[1], [1, 2, 3, 4]]], unknown_id=4)
    found = exposed(RowSeries("a", "1", ["x"], {}, counts, {}, ""))
    scores = [found["score_bucket", end] for end in ("0.5", "0.55", "0.95", "+Inf")]
    assert scores == [0, 1, 1, 2]
    lengths = [found["row_tokens_bucket", end] for end in ("0.0", "1.0", "3.0", "7.0", "+Inf")]
    assert lengths == [0, 1, 1, 2, 2]
    assert (found["row_tokens_sum", ""], found["unknown_tokens_total", ""]) == (5, 1)


def test_images_have_no_tokens() -> None:
    counts = RowCounts()
    counts.count_rows([(0, 0.5)], ())
    found = exposed(RowSeries("a", "1", ["x"], {}, counts, {}, ""))
    assert not any(name.startswith(("row_tokens", "unknown")) for name, _ in found)
