"""What is counted while serving; this one forgets everything, `prometheus` keeps and tells it.

Knows neither HTTP nor the format of ``/metrics``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow_pt_deploy.serving.http.mlflow_protocol import Answer
    from mlflow_pt_deploy.serving.model.loaded_model import Version


class Metrics:
    """Told of what happens; counts nothing."""

    content_type = b"application/json"

    def answered(
        self, name: str, label: str, result: Answer, seconds: float, times: int = 1
    ) -> None:
        """Requests for model `name` were answered by version `label`, empty where by none.

        Args:
            name, label: As said.
            result: What each of them got.
            seconds: How long each took.
            times: How many they were.
        """

    def swapped(self, name: str, version: Version, seconds: float) -> None:
        """A version serves from now on; its preparation took `seconds`."""

    def unloaded(self, name: str) -> None:
        """A model was taken out of memory."""

    def refused(self, name: str) -> None:
        """A version may not serve."""

    def registry(self, name: str, answers: bool) -> None:
        """The registry began or ceased to answer."""

    def gauge(self, kind: str, name: str, value: Callable[[], int]) -> None:
        """`value` may be asked for model `name`'s ``queue_rows``, ``in_flight`` or ``loaded``."""

    def expose(self) -> bytes | None:
        """All series in Prometheus' text format; None: this one has none."""
        return None


def best_metrics() -> Metrics:
    """Those that tell, where the extra `serve` is installed."""
    try:
        from mlflow_pt_deploy.serving.observability.prometheus import PrometheusMetrics
    except ModuleNotFoundError:
        return Metrics()
    return PrometheusMetrics()
