"""Metrics interface; the base class records nothing."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow_pt_deploy.evaluation.statistics import Estimate
    from mlflow_pt_deploy.serving.http.response import Response
    from mlflow_pt_deploy.serving.model.loaded_model import LoadedModel


class Metrics:
    """Observer of events that `prometheus` counts; this one does nothing."""

    content_type = "application/json"

    def response_sent(self, name: str, label: str, response: Response, seconds: float) -> None:
        """Record a response for model `name` from version `label` (empty: none)."""

    def version_activated(self, name: str, version: LoadedModel, seconds: float) -> None:
        """Record that a version was activated after `seconds` of preparation."""

    def version_unloaded(self, name: str) -> None:
        """Record that a model was evicted from memory."""

    def version_rejected(self, name: str) -> None:
        """Record that a version was rejected."""

    def registry_reachable(self, name: str, answers: bool) -> None:
        """Record whether the registry answers."""

    def judged(self, name: str, label: str, rows: int, accuracy: Estimate) -> None:
        """Record the live accuracy of a version, by all `rows` with feedback."""

    def answers_dropped(self, rows: int) -> None:
        """Record that answered rows were not remembered for feedback."""

    def gauge(self, kind: str, name: str, value: Callable[[], int]) -> None:
        """Sample `value` as ``queue_rows``, ``in_flight`` or ``loaded`` of model `name`."""

    def forget_process(self, pid: int) -> None:
        """Drop the gauges of a worker that died; its counters stay."""

    def sample(self) -> None:
        """Sample all gauges."""

    def expose(self) -> bytes | None:
        """All series in Prometheus' text format; None if nothing is recorded."""
        return None


def new_metrics() -> Metrics:
    """Metrics of a worker; they record nothing without the extra `serve`."""
    if find_spec("prometheus_client") is None:
        return Metrics()
    from mlflow_pt_deploy.serving.observability.prometheus import PrometheusMetrics

    return PrometheusMetrics()
