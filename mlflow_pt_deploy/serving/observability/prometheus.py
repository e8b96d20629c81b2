"""Metrics in Prometheus format, by model and version, with the official client library.

The client's multiprocess mode adds up all workers: `PROMETHEUS_MULTIPROC_DIR` must be set before
this module is imported.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from mlflow_pt_deploy.evaluation.statistics import Estimate
from mlflow_pt_deploy.serving.http.response import Response
from mlflow_pt_deploy.serving.model.loaded_model import LoadedModel
from mlflow_pt_deploy.serving.observability.metrics import Figure, Metrics, RowSeries
from mlflow_pt_deploy.serving.observability.row_metrics import RowCollector
from mlflow_pt_deploy.system.process_memory import resident_mb

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_VERSION = ("model", "version")
_STATUSES = ("200", "400", "401", "413", "429", "500", "503", "504")

MAX_VERSIONS = 20
"""Versions of a model with their own series in one process; later ones share ``other``."""


class PrometheusMetrics(Metrics):
    """Counters, histograms and gauges in a private registry, so that several servers do not mix."""

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self) -> None:
        self._multiprocess = "PROMETHEUS_MULTIPROC_DIR" in os.environ
        self._registry = registry = CollectorRegistry()
        self._computed = CollectorRegistry(
            auto_describe=False
        )  # the same in every worker: never added up

        def counter(name: str, about: str, *labels: str) -> Counter:
            return Counter(f"pt_deploy_{name}", about, labels, registry=registry)

        def histogram(name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(
                f"pt_deploy_{name}", about, _VERSION, buckets=buckets, registry=registry
            )

        def gauge(name: str, about: str, *labels: str, mode: str = "livesum") -> Gauge:
            return Gauge(
                f"pt_deploy_{name}",
                about,
                labels,
                registry=registry,
                multiprocess_mode=mode,  # type: ignore[arg-type]
            )

        self._requests = counter("requests", "Requests answered", *_VERSION, "status")
        self._errors = counter("errors", "Requests not answered with 200", *_VERSION, "error")
        self._seconds = histogram("request_seconds", "Headers read to response sent", _SECONDS)
        self._rows = histogram("batch_rows", "Rows in a call of the model", _ROWS)
        self._tokens = counter("batch_tokens", "Tokens computed, without padding", *_VERSION)
        self._padding = counter("batch_padding_tokens", "Padding tokens computed", *_VERSION)
        self._cached = counter("cache_rows", "Rows looked up in the cache", *_VERSION, "result")
        self._compute = histogram("compute_seconds", "One call of the model", _SECONDS)
        self._canary_failures = counter(
            "canary_failures", "Requests that a canary failed and the champion answered", *_VERSION
        )
        self._swaps = counter("swaps", "Versions activated or rejected", "model", "result")
        self._unloads = counter("unloads", "Models evicted from memory", "model")
        self._preparation = gauge(
            "swap_seconds", "Preparation of the last version", "model", mode="livemax"
        )
        self._streams = gauge("streams", "Concurrent calls of the model", "model")
        self._registry_up = gauge(
            "registry_up", "1 while the registry answers", "model", mode="livemin"
        )
        self._info = gauge(
            "model_info", "Workers that serve this version", *_VERSION, "variant", "digest"
        )
        # of the worker that leads, for all
        shared = "livemostrecent"
        self._judged = gauge("judged_rows", "Rows with feedback", *_VERSION, mode=shared)
        self._accuracy = tuple(
            gauge(f"live_accuracy{bound}", about, *_VERSION, mode=shared)
            for bound, about in (
                ("", "Share of judged rows that were answered correctly"),
                ("_low", "Lower bound of its 95 % interval"),
                ("_high", "Upper bound of its 95 % interval"),
            )
        )
        self._dropped = counter("feedback_dropped_rows", "Answered rows that were not remembered")
        self._up = gauge("replica_up", "Workers that run")
        self._resident = gauge("resident_memory_bytes", "Resident memory of all workers")
        self._sampled = {
            "queue_rows": gauge("queue_rows", "Rows in the queue", "model"),
            "in_flight": gauge("in_flight", "Requests being answered", "model"),
            "loaded": gauge("loaded", "Workers that hold the model in memory", "model"),
            "device_batch_limit": gauge(
                "device_batch_limit",
                "Largest call while device memory is short, in tokens or images; 0: no limit",
                "model",
                mode="livemax",
            ),
        }
        self._out_of_memory = counter(
            "device_out_of_memory", "Calls of the model that found no device memory", "model"
        )
        self._figures = _Figures()
        self._computed.register(self._figures)
        self._samplers: list[tuple[Gauge, Callable[[], int]]] = []
        self._totals: list[_SampledCounter] = []
        self._observers: dict[tuple[str, str, int, str], tuple[list[Counter], Histogram]] = {}
        self._versions: dict[str, set[str]] = {}
        self._serving: dict[str, tuple[str, str, str, str]] = {}
        self._up.set(1)

    def response_sent(self, name: str, label: str, response: Response, seconds: float) -> None:
        """See `Metrics`."""
        key = (name, label, response.status, response.error_code)
        found = self._observers.get(key)
        if found is None:
            version = self._version(name, label)
            counters = [self._requests.labels(name, version, str(response.status))]
            if response.error_code:
                counters.append(self._errors.labels(name, version, response.error_code))
            found = self._observers[key] = counters, self._seconds.labels(name, version)
        for counter in found[0]:
            counter.inc()
        found[1].observe(seconds)

    def version_loaded(self, name: str, version: LoadedModel) -> None:
        """See `Metrics`."""
        label = self._version(name, version.label)
        rows, compute = self._rows.labels(name, label), self._compute.labels(name, label)
        tokens, padding = self._tokens.labels(name, label), self._padding.labels(name, label)
        for status in _STATUSES:
            self._requests.labels(name, label, status)

        def on_call(batch_rows: int, real: int, padded: int, took_s: float) -> None:
            rows.observe(batch_rows)
            tokens.inc(real)
            padding.inc(max(0, padded - real))
            compute.observe(took_s)

        version.pyfunc.service.batcher.executor.on_call = on_call
        if (cache := version.pyfunc.service.cache) is not None:
            hit, miss = (self._cached.labels(name, label, result) for result in ("hit", "miss"))

            def on_lookup(hits: int, misses: int) -> None:
                hit.inc(hits)
                miss.inc(misses)

            cache.on_lookup = on_lookup

    def canary_failed(self, name: str, label: str) -> None:
        """See `Metrics`."""
        self._canary_failures.labels(name, self._version(name, label)).inc()

    def version_activated(self, name: str, version: LoadedModel, seconds: float) -> None:
        """See `Metrics`."""
        self.version_loaded(name, version)
        batcher = version.pyfunc.service.batcher
        self._streams.labels(name).set(batcher.concurrency.streams)
        manifest = version.pyfunc.loaded.manifest
        for result in ("done", "refused"):
            self._swaps.labels(name, result)
        if self._retire(name):
            self._swaps.labels(name, "done").inc()
        self._serving[name] = (name, version.label, manifest.name, manifest.digest)
        self._info.labels(*self._serving[name]).set(1)
        self._preparation.labels(name).set(seconds)
        self._registry_up.labels(name).set(1)

    def version_unloaded(self, name: str) -> None:
        """See `Metrics`."""
        self._retire(name)
        self._unloads.labels(name).inc()

    def version_rejected(self, name: str) -> None:
        """See `Metrics`."""
        self._swaps.labels(name, "refused").inc()

    def registry_reachable(self, name: str, answers: bool) -> None:
        """See `Metrics`."""
        self._registry_up.labels(name).set(int(answers))

    def judged(self, name: str, label: str, rows: int, accuracy: Estimate) -> None:
        """See `Metrics`."""
        version = self._version(name, label)
        self._judged.labels(name, version).set(rows)
        for gauge, value in zip(self._accuracy, accuracy, strict=True):
            gauge.labels(name, version).set(value)

    def answers_dropped(self, rows: int) -> None:
        """See `Metrics`."""
        self._dropped.inc(rows)

    def gauge(self, kind: str, name: str, value: Callable[[], int]) -> None:
        """See `Metrics`."""
        self._samplers.append((self._sampled[kind].labels(name), value))

    def count_out_of_memory(self, name: str, total: Callable[[], int]) -> None:
        """See `Metrics`."""
        self._totals.append(_SampledCounter(self._out_of_memory.labels(name), total))

    def add_rows(self, series: Callable[[], Iterable[RowSeries]]) -> None:
        """See `Metrics`."""
        self._computed.register(RowCollector(series))

    def add_figures(self, read: Callable[[], Iterable[Figure]]) -> None:
        """See `Metrics`."""
        self._figures.readers.append(read)

    def forget_process(self, pid: int) -> None:
        """See `Metrics`."""
        mark_process_dead(pid)  # type: ignore[no-untyped-call]

    def sample(self) -> None:
        """See `Metrics`."""
        self._resident.set(round(resident_mb() * 1e6))
        for gauge, value in self._samplers:
            gauge.set(value())
        for total in self._totals:
            total.sample()

    def expose(self) -> bytes:
        """See `Metrics`."""
        self.sample()
        registry = self._registry
        if self._multiprocess:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        text: bytes = generate_latest(registry) + generate_latest(self._computed)
        return text

    def _retire(self, name: str) -> bool:
        before = self._serving.pop(name, None)
        if before is not None:
            self._info.labels(*before).set(0)
        return before is not None

    def _version(self, name: str, label: str) -> str:
        """Label value of a version; the number of different values is bounded."""
        known = self._versions.setdefault(name, set())
        if label not in known and len(known) >= MAX_VERSIONS:
            return "other"
        known.add(label)
        return label


class _SampledCounter:
    """Follows a count that begins again at 0 with each version."""

    def __init__(self, counter: Counter, total: Callable[[], int]) -> None:
        self._counter, self._total = counter, total
        self._seen = 0
        self._lock = threading.Lock()

    def sample(self) -> None:
        with self._lock:  # the watchdog samples, and each exposition
            total = self._total()
            self._counter.inc(total - self._seen if total >= self._seen else total)
            self._seen = total


class _Figures:
    """Figures as a collector of the client library."""

    def __init__(self) -> None:
        self.readers: list[Callable[[], Iterable[Figure]]] = []

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """One family for each name."""
        families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
        for figure in (figure for read in self.readers for figure in read()):
            family = families.get(figure.name)
            if family is None:
                kind = CounterMetricFamily if figure.name.endswith("_total") else GaugeMetricFamily
                family = kind(f"pt_deploy_{figure.name}", figure.about, labels=list(figure.labels))
                families[figure.name] = family
            family.add_metric(list(figure.labels.values()), figure.value)
        yield from families.values()
