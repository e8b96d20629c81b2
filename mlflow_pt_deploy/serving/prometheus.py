"""What `/metrics` tells, in Prometheus' format and by model and version.

The hot path holds the counters it needs; nothing is looked up or formatted there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from mlflow_pt_deploy.serving.metrics import Metrics
from mlflow_pt_deploy.serving.protocol import Answer
from mlflow_pt_deploy.serving.version import Version

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_VERSION = ("model", "version")


class _Series(NamedTuple):
    """What one kind of answer adds to."""

    requests: Counter
    seconds: Histogram
    errors: Counter | None


class PrometheusMetrics(Metrics):
    """Counts in a registry of its own, so that several servers in one process do not mix."""

    content_type = b"text/plain; version=0.0.4; charset=utf-8"

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)

        def counter(name: str, about: str, *labels: str) -> Counter:
            return Counter(f"pt_deploy_{name}", about, labels, registry=registry)

        def histogram(name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
            full = f"pt_deploy_{name}"
            return Histogram(full, about, _VERSION, buckets=buckets, registry=registry)

        def gauge(name: str, about: str, *labels: str) -> Gauge:
            return Gauge(f"pt_deploy_{name}", about, labels, registry=registry)

        self._requests = counter("requests", "Answered requests", *_VERSION, "status")
        self._errors = counter("errors", "Requests not answered with 200", *_VERSION, "error")
        self._seconds = histogram("request_seconds", "From the first byte to the last", _SECONDS)
        self._rows = histogram("batch_rows", "Rows in a call of the model", _ROWS)
        self._tokens = counter("batch_tokens", "Tokens computed, padding left out", *_VERSION)
        self._padding = counter("batch_padding_tokens", "Padding computed", *_VERSION)
        self._compute = histogram("compute_seconds", "One call of the model", _SECONDS)
        self._swaps = counter("swaps", "Versions that took over or were refused", "model", "result")
        self._unloads = counter("unloads", "Models taken out of memory to make room", "model")
        self._preparation = gauge("swap_seconds", "Preparation of the last swap", "model")
        self._registry_up = gauge("registry_up", "1 while the registry answers", "model")
        self._info = gauge("model_info", "1: what serves", *_VERSION, "variant", "digest")
        self._gauges = {
            "queue_rows": gauge("queue_rows", "Rows that wait", "model"),
            "in_flight": gauge("in_flight", "Requests being answered", "model"),
            "loaded": gauge("loaded", "1 while the model is in memory", "model"),
        }
        self._series: dict[tuple[str, str, int, str], _Series] = {}
        self._serving: dict[str, tuple[str, str, str, str]] = {}

    def answered(self, name: str, label: str, result: Answer, seconds: float) -> None:
        """See `Metrics`."""
        key = (name, label, result.status, result.error)
        series = self._series.get(key)
        if series is None:
            series = self._series[key] = _Series(
                self._requests.labels(name, label, result.status),
                self._seconds.labels(name, label),
                self._errors.labels(name, label, result.error) if result.error else None,
            )
        series.requests.inc()
        series.seconds.observe(seconds)
        if series.errors is not None:
            series.errors.inc()

    def swapped(self, name: str, version: Version, seconds: float) -> None:
        """See `Metrics`."""
        rows = self._rows.labels(name, version.label)
        tokens = self._tokens.labels(name, version.label)
        padding = self._padding.labels(name, version.label)
        compute = self._compute.labels(name, version.label)

        def observe(batch_rows: int, real: int, padded: int, took_s: float) -> None:
            rows.observe(batch_rows)
            tokens.inc(real)
            padding.inc(padded - real)
            compute.observe(took_s)

        version.pyfunc.batcher.observe = observe
        manifest = version.pyfunc.loaded.manifest
        before = self._serving.get(name)
        if before is not None:
            self._info.remove(*before)
            self._swaps.labels(name, "done").inc()
        self._serving[name] = (name, version.label, manifest.name, manifest.digest)
        self._info.labels(*self._serving[name]).set(1)
        self._preparation.labels(name).set(seconds)
        self._registry_up.labels(name).set(1)

    def unloaded(self, name: str) -> None:
        """See `Metrics`."""
        self._info.remove(*self._serving.pop(name))
        self._unloads.labels(name).inc()

    def refused(self, name: str) -> None:
        """See `Metrics`."""
        self._swaps.labels(name, "refused").inc()

    def registry(self, name: str, answers: bool) -> None:
        """See `Metrics`."""
        self._registry_up.labels(name).set(int(answers))

    def gauge(self, kind: str, name: str, value: Callable[[], int]) -> None:
        """See `Metrics`."""
        self._gauges[kind].labels(name).set_function(value)

    def expose(self) -> bytes:
        """See `Metrics`."""
        text: bytes = generate_latest(self._registry)
        return text


def join_series(texts: Sequence[bytes | None]) -> bytes:
    """All series of several replicas, told apart by the label ``replica``.

    Not their sums: a replica that is started again counts from 0, which Prometheus understands of
    a series, but not of a sum.

    Args:
        texts: What each exposes; None: it did not answer.
    """
    families: dict[str, Metric] = {}
    up = Metric("pt_deploy_replica_up", "1: its series are here", "gauge")
    for replica, text in enumerate(texts):
        mark = {"replica": str(replica)}
        up.add_sample(up.name, mark, 0 if text is None else 1)
        for family in text_string_to_metric_families((text or b"").decode()):
            kept = families.setdefault(
                family.name, Metric(family.name, family.documentation, family.type)
            )
            for sample in family.samples:
                kept.add_sample(sample.name, {**sample.labels, **mark}, sample.value)
    registry = CollectorRegistry()
    registry.register(_Kept([up, *families.values()]))
    joined: bytes = generate_latest(registry)
    return joined


class _Kept(Collector):
    """What was read elsewhere, to be written again."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families
