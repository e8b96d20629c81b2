"""Why canaries were ended, known to all workers of a server."""

from __future__ import annotations

import threading
from typing import NamedTuple

from mlflow_pt_deploy.serving.worker_state import WorkerStates


class Ending(NamedTuple):
    """A canary that was ended by a guardrail.

    Attributes:
        version: Label of the canary.
        reason: What it did.
        since: Time in UTC, ISO 8601.
        host: Where the server runs.
        tagged: Whether the registry took the tag that says so.
    """

    version: str
    reason: str
    since: str
    host: str
    tagged: bool = False

    @property
    def text(self) -> str:
        """The value of the tag."""
        return f"{self.reason} ({self.since}, server on {self.host})"


class Endings:
    """Endings by model and version, in a file of the run directory; the leader alone writes.

    Args:
        states: State of all workers; None: this process is the server.
    """

    def __init__(self, states: WorkerStates | None) -> None:
        self._states = states
        self._own: dict[str, dict[str, Ending]] = {}
        self._lock = threading.Lock()

    def of_model(self, model: str) -> dict[str, Ending]:
        """Endings of a model's versions."""
        return self._read().get(model, {})

    def all(self) -> list[tuple[str, Ending]]:
        """All endings, with the model's name."""
        return [(model, each) for model, ends in self._read().items() for each in ends.values()]

    def write(self, model: str, ending: Ending) -> None:
        """Publish an ending."""
        with self._lock:
            found = self._read()
            found.setdefault(model, {})[ending.version] = ending
            if self._states is not None:
                self._states.publish("canaries", found)

    def _read(self) -> dict[str, dict[str, Ending]]:
        if self._states is None:
            return self._own
        return {
            model: {version: Ending(*values) for version, values in versions.items()}
            for model, versions in self._states.document("canaries").items()
        }
