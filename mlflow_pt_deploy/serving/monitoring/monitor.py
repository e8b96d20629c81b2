"""A thread that publishes this worker's counts, and runs the duties of a server in one worker.

A duty is done once for all workers of a server: ending a canary, writing to the registry. The
worker that holds the lock ``leader.lock`` of the run directory does them; when it dies another one
takes over.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence

from mlflow_pt_deploy.serving.lifecycle.served_model import ServedModel
from mlflow_pt_deploy.serving.model.version_counts import VersionCounts
from mlflow_pt_deploy.serving.worker_state import WorkerStates

TICK_S = 1.0

ServerCounts = Mapping[str, Mapping[str, VersionCounts]]
"""Counts of all workers by model and version label."""

_logger = logging.getLogger(__name__)


class Duty:
    """Something that a server does beside answering; called about once a second."""

    def follow(self) -> None:
        """Act in every worker."""

    def lead(self, counts: ServerCounts) -> None:
        """Act in one worker, with the counts of all."""

    def close(self, counts: ServerCounts) -> None:
        """Act in one worker when the server ends."""


class Monitor(threading.Thread):
    """Publishes counts and runs duties once a second.

    Args:
        models: Models by name.
        duties: What is done beside answering.
        states: State of all workers; None: this process is the server.
        shared_counts: Counts that all workers keep together; they are added.
    """

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        duties: Sequence[Duty],
        states: WorkerStates | None = None,
        shared_counts: Callable[[], ServerCounts] = dict,
    ) -> None:
        super().__init__(name="monitor", daemon=True)
        self._models = models
        self._duties = duties
        self._states = states
        self._shared_counts = shared_counts
        self._stopped = threading.Event()

    def run(self) -> None:
        """Act until `stop`."""
        while not self._stopped.wait(TICK_S):
            self.tick()

    def tick(self) -> None:
        """Publish the counts, then run all duties; a failing one does not stop the others."""
        self._publish()
        leads = self._states is None or self._states.lead()
        counts = self.counts() if leads else {}
        for duty in self._duties:
            try:
                duty.follow()
                if leads:
                    duty.lead(counts)
            except Exception:
                _logger.exception("%s failed", type(duty).__name__)

    def stop(self) -> None:
        """End the thread, and let the duties finish; called when the event loop has ended."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        self._publish()
        if self._states is not None and not self._states.lead():
            return
        counts = self.counts()
        for duty in self._duties:
            try:
                duty.close(counts)
            except Exception:
                _logger.exception("%s failed", type(duty).__name__)

    def counts(self) -> dict[str, dict[str, VersionCounts]]:
        """See `server_counts`; with what all workers count together."""
        found = server_counts(self._models, self._states)
        for name, versions in self._shared_counts().items():
            for label, counts in versions.items():
                before = found.setdefault(name, {}).get(label, VersionCounts())
                found[name][label] = before.plus(counts)
        return found

    def _publish(self) -> None:
        if self._states is not None:
            self._states.write_counts(
                {
                    name: {label: each.to_json() for label, each in model.counts.items()}
                    for name, model in self._models.items()
                }
            )


def server_counts(
    models: Mapping[str, ServedModel], states: WorkerStates | None
) -> dict[str, dict[str, VersionCounts]]:
    """Counts of all workers, also of those that have died, as they were published last.

    Args:
        models: Models by name.
        states: State of all workers; None: this process is the server.
    """
    if states is None:
        return {
            name: {label: VersionCounts().plus(each) for label, each in list(model.counts.items())}
            for name, model in models.items()
        }
    found: dict[str, dict[str, VersionCounts]] = {name: {} for name in models}
    for document in states.counts():
        for name, versions in document.items():
            for label, values in versions.items():
                mine = VersionCounts.from_json(values)
                before = found.setdefault(name, {}).get(label)
                found[name][label] = before.plus(mine) if before else mine
    return found
