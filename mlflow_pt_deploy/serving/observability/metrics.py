"""Metrics interface; the base class records nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from mlflow_pt_deploy.evaluation.drift import Shift
    from mlflow_pt_deploy.evaluation.profile import RowCounts
    from mlflow_pt_deploy.evaluation.statistics import Estimate
    from mlflow_pt_deploy.serving.http.response import Response
    from mlflow_pt_deploy.serving.model.loaded_model import LoadedModel


class RowSeries(NamedTuple):
    """Answered rows of one version, over all workers.

    Attributes:
        model: Name of the model.
        version: Label of the version.
        labels: Names of the classes.
        profile: Rows of the profile by class index; empty if there is none.
        counts: The answered rows.
        shifts: How far they are from the profile, by window.
        reason: Why there are no shifts.
    """

    model: str
    version: str
    labels: Sequence[str]
    profile: Mapping[int, int]
    counts: RowCounts
    shifts: Mapping[str, Sequence[Shift]]
    reason: str


class Figure(NamedTuple):
    """A number that is read when metrics are exposed, the same in every worker.

    Attributes:
        name: Without the prefix ``pt_deploy_``; that of a counter ends with ``_total``.
        about: Its meaning.
        labels: Its labels.
        value: The number.
    """

    name: str
    about: str
    labels: Mapping[str, str]
    value: float


class Metrics:
    """Observer of events that `prometheus` counts; this one does nothing."""

    content_type = "application/json"

    def response_sent(self, name: str, label: str, response: Response, seconds: float) -> None:
        """Record a response for model `name` from version `label` (empty: none)."""

    def version_activated(self, name: str, version: LoadedModel, seconds: float) -> None:
        """Record that a version was activated after `seconds` of preparation."""

    def version_loaded(self, name: str, version: LoadedModel) -> None:
        """Record the calls of a version from now on; a canary is not activated."""

    def canary_failed(self, name: str, label: str) -> None:
        """Record that a canary did not answer a request and the champion did."""

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
        """Sample `value` as a gauge of model `name`.

        Kinds: ``queue_rows``, ``in_flight``, ``loaded``, ``device_batch_limit``.
        """

    def count_out_of_memory(self, name: str, total: Callable[[], int]) -> None:
        """Sample `total`, the count of the current version of model `name`, as a counter."""

    def add_rows(self, series: Callable[[], Iterable[RowSeries]]) -> None:
        """Expose the answered rows that `series` returns."""

    def add_figures(self, read: Callable[[], Iterable[Figure]]) -> None:
        """Expose what `read` returns at each exposition."""

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
