"""What is counted while serving. This one forgets everything; see `prometheus` for one that tells.

Knows neither HTTP nor the format of `/metrics`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow_pt_deploy.serving.protocol import Answer
    from mlflow_pt_deploy.serving.version import Version


class Metrics:
    """Told of what happens; counts nothing."""

    def answered(self, name: str, label: str, result: Answer, seconds: float) -> None:
        """A request for model `name` was answered by version `label`."""

    def swapped(self, name: str, version: Version, seconds: float) -> None:
        """A version serves from now on; its preparation took `seconds`."""

    def refused(self, name: str) -> None:
        """A version may not serve."""

    def registry(self, name: str, answers: bool) -> None:
        """The registry began or ceased to answer."""

    def gauge(self, name: str, value: Callable[[], int]) -> None:
        """Rows of a model that wait may be asked for."""
