"""The interface of metrics, and one that records nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow_pt_deploy.serving.http.response import Response
    from mlflow_pt_deploy.serving.model.loaded_model import LoadedModel


class Metrics:
    """Called on every event that `prometheus` counts; records nothing."""

    content_type = "application/json"

    def response_sent(self, name: str, label: str, response: Response, seconds: float) -> None:
        """A request for model `name` was answered by version `label` (empty: by none)."""

    def version_activated(self, name: str, version: LoadedModel, seconds: float) -> None:
        """A version was activated after `seconds` of preparation."""

    def version_unloaded(self, name: str) -> None:
        """A model was evicted from memory."""

    def version_rejected(self, name: str) -> None:
        """A version was rejected."""

    def registry_reachable(self, name: str, answers: bool) -> None:
        """The registry began or ceased to answer."""

    def gauge(self, kind: str, name: str, value: Callable[[], int]) -> None:
        """`value` is sampled for model `name`'s ``queue_rows``, ``in_flight`` or ``loaded``."""

    def sample(self) -> None:
        """Sample all gauges."""

    def expose(self) -> bytes | None:
        """All series in Prometheus' text format; None: there are none."""
        return None
