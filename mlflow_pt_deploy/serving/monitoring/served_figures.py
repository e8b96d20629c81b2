"""Writes what was served back to the registered versions, so that it stands beside the promise.

Registries are slow at times, so writing has a thread of its own; other duties go on.
"""

from __future__ import annotations

import logging
import math
import socket
import sqlite3
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import NamedTuple

from mlflow_pt_deploy.evaluation.profile import Profile
from mlflow_pt_deploy.registry.addresses import ResolvedVersion
from mlflow_pt_deploy.registry.profile_tags import SERVED_TAG
from mlflow_pt_deploy.registry.served_figures import PREFIX, write_served
from mlflow_pt_deploy.serving.lifecycle.served_model import ServedModel
from mlflow_pt_deploy.serving.model.version_counts import VersionCounts
from mlflow_pt_deploy.serving.monitoring.feedback import live_accuracy
from mlflow_pt_deploy.serving.monitoring.feedback_store import FeedbackStore, Judged
from mlflow_pt_deploy.serving.monitoring.monitor import Duty, ServerCounts
from mlflow_pt_deploy.system.clock import now
from mlflow_pt_deploy.system.hardware import hardware

CLOSE_S = 3.0
"""Most seconds that the end of a server waits for the registry."""
RUN_S = 300.0
"""Least seconds between two points of a version's metrics: MLflow keeps all of them."""

_logger = logging.getLogger(__name__)

Key = tuple[str, str]
"""A model and the label of a version."""


class _Report(NamedTuple):
    """What is written of a version."""

    key: Key
    resolved: ResolvedVersion
    counts: VersionCounts
    rows_per_s: float | None
    until: str


class ServedFigures(Duty):
    """A duty that writes requests, latency, accuracy and a profile of what was served.

    Args:
        models: Models by name.
        report_s: Least seconds between two reports.
        since: When the server started.
        store: Feedback of all workers, if it is on.
    """

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        report_s: float,
        since: str,
        store: FeedbackStore | None = None,
    ) -> None:
        self._models = models
        self._report_s = report_s
        self._since = since
        self._store = store
        self._marked: dict[Key, VersionCounts] = {}
        self._marked_at: float | None = None
        self._written: dict[Key, VersionCounts] = {}
        self._logged: dict[Key, tuple[float, VersionCounts]] = {}
        self._tables: dict[Key, Sequence[Judged]] = {}
        self._failed: set[Key] = set()
        self._thread: threading.Thread | None = None

    def lead(self, counts: ServerCounts) -> None:
        """Write what has changed, every `report_s` seconds."""
        at = time.monotonic()
        if self._marked_at is None:
            self._mark(counts, at)
        elif at - self._marked_at >= self._report_s:
            reports = self._reports(counts, at)
            self._mark(counts, at)
            if self._thread is None or not self._thread.is_alive():
                self._start(reports)

    def close(self, counts: ServerCounts) -> None:
        """Write the last figures, for at most `CLOSE_S` seconds."""
        end = time.monotonic() + CLOSE_S
        if self._thread is not None:
            self._thread.join(CLOSE_S)
            if self._thread.is_alive():
                return
        self._written = {key: counted for key, (_, counted) in self._logged.items()}
        self._logged = {}
        self._start(self._reports(counts, time.monotonic()))
        if self._thread is not None:
            self._thread.join(max(0.0, end - time.monotonic()))

    def _mark(self, counts: ServerCounts, at: float) -> None:
        """Begin a new interval for rows per second."""
        self._marked_at = at
        self._marked = {
            (model, label): each
            for model, versions in counts.items()
            for label, each in versions.items()
        }

    def _reports(self, counts: ServerCounts, at: float) -> list[_Report]:
        seconds = 0.0 if self._marked_at is None else at - self._marked_at
        found = []
        for model, versions in counts.items():
            for label, each in versions.items():
                key, counted = (model, label), self._models[model].counted.get(label)
                if counted is None or not counted.resolved.version or not each.requests:
                    continue
                if each != self._written.get(key):
                    before = self._marked.get(key, VersionCounts())
                    rate = (each.rows - before.rows) / seconds if seconds >= 1 else None
                    found.append(_Report(key, counted.resolved, each, rate, now()))
        return found

    def _start(self, reports: Sequence[_Report]) -> None:
        if reports:
            self._thread = threading.Thread(
                target=self._write_all, args=(reports,), name="served-figures", daemon=True
            )
            self._thread.start()

    def _write_all(self, reports: Sequence[_Report]) -> None:
        judged: Mapping[Key, Sequence[Judged]] = {}
        with suppress(sqlite3.Error):  # the collector logs it
            judged = self._store.judged() if self._store else {}
        for report in reports:
            try:
                self._write(report, judged.get(report.key, ()))
            except Exception as error:  # of MLflow, requests or an artifact store
                if report.key not in self._failed:
                    self._failed.add(report.key)
                    _logger.warning(
                        "%s: what version %s served cannot be written to the registry, and will be "
                        "tried again: %s",
                        *report.key,
                        type(error).__name__,
                    )
            else:
                self._written[report.key] = report.counts
                self._failed.discard(report.key)

    def _write(self, report: _Report, cells: Sequence[Judged]) -> None:
        logged_at, _ = self._logged.get(report.key, (-math.inf, None))
        due = time.monotonic() - logged_at >= RUN_S
        table = cells if due and cells != self._tables.get(report.key) else ()
        found = figures(report.counts, report.rows_per_s)
        tags = {
            **{PREFIX + name: str(value) for name, value in found.items()},
            PREFIX + "since": self._since,
            PREFIX + "until": report.until,
            PREFIX + "host": socket.gethostname(),
            PREFIX + "machine": _machine(),
            SERVED_TAG: Profile.of(report.counts).to_tag(),
        }
        write_served(report.resolved, tags, found if due else None, table)
        if due:
            self._logged[report.key] = time.monotonic(), report.counts
            self._tables[report.key] = cells


def figures(counts: VersionCounts, rows_per_s: float | None = None) -> dict[str, float]:
    """Figures of a version by name; those that are not known are left out.

    Args:
        counts: Of all workers.
        rows_per_s: Rows answered per second in the last interval.
    """
    found: dict[str, float | None] = {
        "requests": counts.requests,
        "errors": counts.errors,
        "rows": counts.rows,
        "rows_per_s": rows_per_s,
    }
    for name, share in (("latency_p50_ms", 0.5), ("latency_p99_ms", 0.99)):
        seconds = counts.quantile_s(share)
        found[name] = None if seconds is None else seconds * 1000
    if counts.compared:
        found["compared_rows"] = counts.compared
        found["agreement"] = 1 - counts.disagreed / counts.compared
    if accuracy := live_accuracy(counts):
        found["judged_rows"] = counts.judged
        names = ("accuracy", "accuracy_low", "accuracy_high")
        found |= dict(zip(names, accuracy, strict=True))
    return {name: _rounded(value) for name, value in found.items() if value is not None}


def _rounded(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.4g}")


@cache
def _machine() -> str:
    facts = hardware()
    return f"{facts.get('cpu', 'unknown CPU')}, {facts['cores']} cores a replica"
