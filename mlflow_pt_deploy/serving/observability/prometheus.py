"""What `/metrics` tells, in Prometheus' format and by model and version.

What each request and each batch adds to is counted here without a lock, since one thread at a time
does so: the event loop, and whoever computes a batch.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any, Generic, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from mlflow_pt_deploy.serving.http.mlflow_protocol import Answer
from mlflow_pt_deploy.serving.model.loaded_model import Version
from mlflow_pt_deploy.serving.observability.metrics import Metrics

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_VERSION = ("model", "version")


class _Count:
    """A number that only grows."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0

    def add_to(self, family: CounterMetricFamily, labels: Sequence[str]) -> None:
        """Tell it."""
        family.add_metric(labels, self.value)


class _Spread:
    """How many values came up to each of some bounds, and beyond."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def add_to(self, family: HistogramMetricFamily, labels: Sequence[str]) -> None:
        """Tell it."""
        names = [*map(repr, map(float, self._bounds)), "+Inf"]
        buckets = list(zip(names, accumulate(self._counts), strict=True))
        family.add_metric(labels, buckets, self._sum)


_S = TypeVar("_S", _Count, _Spread)


class _Series(Collector, Generic[_S]):
    """All series of one name, by their labels; what counts keeps hold of its own."""

    def __init__(
        self, registry: CollectorRegistry, family: Callable[[], Any], make: Callable[[], _S]
    ) -> None:
        self._family = family
        self._make: Callable[[], _S] = make
        self._found: dict[tuple[str, ...], _S] = {}
        registry.register(self)

    def labels(self, *labels: str) -> _S:
        """The one with these labels, which from now on is told."""
        return self._found.setdefault(labels, self._make())

    def collect(self) -> Iterable[Metric]:
        """What the library asks for."""
        family = self._family()
        for labels, series in list(self._found.items()):
            series.add_to(family, labels)
        return [family]


class PrometheusMetrics(Metrics):
    """Counts in a registry of its own, so that several servers in one process do not mix."""

    content_type = b"text/plain; version=0.0.4; charset=utf-8"

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)

        def counter(name: str, about: str, *labels: str) -> Counter:
            return Counter(f"pt_deploy_{name}", about, labels, registry=registry)

        def counts(name: str, about: str, *labels: str) -> _Series[_Count]:
            full, all_labels = f"pt_deploy_{name}", (*_VERSION, *labels)
            return _Series(
                registry, lambda: CounterMetricFamily(full, about, labels=all_labels), _Count
            )

        def spread(name: str, about: str, bounds: tuple[float, ...]) -> _Series[_Spread]:
            full = f"pt_deploy_{name}"
            return _Series(
                registry,
                lambda: HistogramMetricFamily(full, about, labels=_VERSION),
                lambda: _Spread(bounds),
            )

        def gauge(name: str, about: str, *labels: str) -> Gauge:
            return Gauge(f"pt_deploy_{name}", about, labels, registry=registry)

        self._requests = counts("requests", "Answered requests", "status")
        self._errors = counts("errors", "Requests not answered with 200", "error")
        self._seconds = spread("request_seconds", "From the first byte to the last", _SECONDS)
        self._rows = spread("batch_rows", "Rows in a call of the model", _ROWS)
        self._tokens = counts("batch_tokens", "Tokens computed, padding left out")
        self._padding = counts("batch_padding_tokens", "Padding computed")
        self._compute = spread("compute_seconds", "One call of the model", _SECONDS)
        self._swaps = counter("swaps", "Versions that took over or were refused", "model", "result")
        self._unloads = counter("unloads", "Models taken out of memory to make room", "model")
        self._preparation = gauge("swap_seconds", "Preparation of the last swap", "model")
        self._streams = gauge("streams", "Calls of the model at a time", "model")
        self._registry_up = gauge("registry_up", "1 while the registry answers", "model")
        self._info = gauge("model_info", "1: what serves", *_VERSION, "variant", "digest")
        self._gauges = {
            "queue_rows": gauge("queue_rows", "Rows that wait", "model"),
            "in_flight": gauge("in_flight", "Requests being answered", "model"),
            "loaded": gauge("loaded", "1 while the model is in memory", "model"),
        }
        self._answers: dict[tuple[str, str, int, str], tuple[list[_Count], _Spread]] = {}
        self._serving: dict[str, tuple[str, str, str, str]] = {}

    def answered(
        self, name: str, label: str, result: Answer, seconds: float, times: int = 1
    ) -> None:
        """See `Metrics`."""
        key = (name, label, result.status, result.error)
        found = self._answers.get(key)
        if found is None:
            counts = [self._requests.labels(name, label, str(result.status))]
            if result.error:
                counts.append(self._errors.labels(name, label, result.error))
            found = self._answers[key] = counts, self._seconds.labels(name, label)
        for count in found[0]:
            count.value += times
        found[1].observe(seconds, times)

    def swapped(self, name: str, version: Version, seconds: float) -> None:
        """See `Metrics`."""
        rows = self._rows.labels(name, version.label)
        tokens = self._tokens.labels(name, version.label)
        padding = self._padding.labels(name, version.label)
        compute = self._compute.labels(name, version.label)

        def observe(batch_rows: int, real: int, padded: int, took_s: float) -> None:
            rows.observe(batch_rows)
            tokens.value += real
            padding.value += padded - real
            compute.observe(took_s)

        version.pyfunc.batcher.calls.observe = observe
        self._streams.labels(name).set(version.pyfunc.batcher.workers.streams)
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
