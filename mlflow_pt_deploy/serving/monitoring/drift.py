"""Compares what a server answers with the rows that decided the promotion of its versions.

The counts of all workers are compared, of the last hour and since the server started: counts since
the start would hide a new drift. The leading worker writes the counts to the run directory every
few minutes, and every worker reads them from there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mlflow_pt_deploy.errors import ModelError
from mlflow_pt_deploy.evaluation.drift import Shift, compare
from mlflow_pt_deploy.evaluation.profile import Profile, RowCounts
from mlflow_pt_deploy.registry.profile_tags import PROFILE_TAG, read_profile
from mlflow_pt_deploy.serving.lifecycle.served_model import ServedModel
from mlflow_pt_deploy.serving.model.loaded_model import LoadedModel
from mlflow_pt_deploy.serving.model.version_counts import VersionCounts
from mlflow_pt_deploy.serving.monitoring.monitor import Duty, ServerCounts, server_counts
from mlflow_pt_deploy.serving.observability.metrics import RowSeries
from mlflow_pt_deploy.serving.worker_state import WorkerStates

LAST_HOUR, SINCE_START = "last_hour", "since_start"
WINDOW_S = 3600.0
STEP_S = 300.0
"""Seconds between two snapshots of the counts; the last hour is exact to them."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Known:
    """What is known of a version, also after it was replaced.

    Attributes:
        labels: Names of its classes.
        profile: Its profile; None: it has none that can be used.
        reason: Why not.
    """

    labels: tuple[str, ...]
    profile: Profile | None
    reason: str


class DriftWatch(Duty):
    """Keeps snapshots of the counts, and compares them with profiles; a `Duty`.

    Args:
        models: Models by name.
        states: State of all workers; None: this process is the server.
        clock: Seconds since 1970.
    """

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        states: WorkerStates | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._models = models
        self._states = states
        self._clock = clock
        self._known: dict[tuple[str, str], _Known] = {}
        self._snapshots: list[dict[str, Any]] = []
        self._next_at = 0.0

    def follow(self) -> None:
        """Read the profiles of new versions; one that cannot be used is logged once."""
        for name, model in self._models.items():
            version = model.current
            if version is not None and (name, version.label) not in self._known:
                kept = {
                    (of, label): each
                    for (of, label), each in self._known.items()
                    if label in self._models[of].counts
                }
                # one assignment: other threads iterate over the dict
                self._known = {**kept, (name, version.label): _known(name, version)}

    def lead(self, counts: ServerCounts) -> None:
        """Add a snapshot if the last one is `STEP_S` old; drop those that are too old."""
        now = self._clock()
        if now < self._next_at:
            return
        kept = [each for each in self._read() if each["at"] > now - WINDOW_S - 2 * STEP_S]
        if not kept or kept[-1]["at"] <= now - STEP_S:
            kept.append({"at": now, "counts": _rows_only(counts)})
            self._snapshots = kept
            if self._states is not None:
                self._states.publish("snapshots", {"snapshots": kept})
        self._next_at = kept[-1]["at"] + STEP_S

    def status(self, name: str) -> dict[str, Any] | None:
        """The field ``drift`` of ``/model``; None while no version is in memory."""
        version = self._models[name].current
        if version is None:
            return None
        for found in self.series((name, version.label)):
            return {
                "reason": found.reason,
                **{
                    window: [shift._asdict() for shift in shifts]
                    for window, shifts in found.shifts.items()
                },
            }
        return None  # it was replaced meanwhile

    def series(self, only: tuple[str, str] | None = None) -> list[RowSeries]:
        """Counts and drift over all workers.

        Args:
            only: Model and version label; None: every version that is known.
        """
        self.follow()
        counts, before = server_counts(self._models, self._states), self._hour_ago()
        found = []
        for (name, label), known in self._known.items():
            if only in (None, (name, label)):
                rows = counts.get(name, {}).get(label, VersionCounts())
                past = RowCounts.from_json(before.get(name, {}).get(label, {}))
                order = known.profile.labels if known.profile else {}
                shifts = _shifts(known.profile, rows, past)
                series = RowSeries(name, label, known.labels, order, rows, shifts, known.reason)
                found.append(series)
        return found

    def _read(self) -> list[dict[str, Any]]:
        if self._states is None:
            return self._snapshots
        found: list[dict[str, Any]] = self._states.document("snapshots").get("snapshots", [])
        return found

    def _hour_ago(self) -> Mapping[str, Any]:
        """Counts when the last hour began; empty if the server is younger."""
        end = self._clock() - WINDOW_S
        past = [each["counts"] for each in self._read() if each["at"] <= end]
        return past[-1] if past else {}


def _known(name: str, version: LoadedModel) -> _Known:
    labels = tuple(version.pyfunc.loaded.labels)
    try:
        profile = read_profile(version.tags, f"version {version.label}")
        if profile.classes != len(labels):
            raise ModelError(
                f"the profile of version {version.label} has {profile.classes} classes, the model "
                f"{len(labels)}. Promote the version again to write its profile."
            )
    except ModelError as error:
        log = _logger.warning if PROFILE_TAG in version.tags else _logger.debug
        log("%s: drift is not computed: %s", name, error)
        return _Known(labels, None, str(error))
    return _Known(labels, profile, "")


def _rows_only(counts: ServerCounts) -> dict[str, Any]:
    """The counts of rows of a snapshot, for a JSON document."""
    return {
        name: {
            label: RowCounts.from_json(each.to_json()).to_json() for label, each in versions.items()
        }
        for name, versions in counts.items()
    }


def _shifts(profile: Profile | None, counts: RowCounts, past: RowCounts) -> dict[str, list[Shift]]:
    """Shifts by window; none without a profile."""
    if profile is None:
        return {LAST_HOUR: [], SINCE_START: []}
    now = RowCounts.from_json(counts.to_json())
    now.labels = now.labels + [0] * (profile.classes - len(now.labels))
    recent = now.plus(past, -1)
    if min(recent.labels) < 0:  # the counts of a worker began again
        recent = now
    return {
        LAST_HOUR: compare(profile, Profile.of(recent)),
        SINCE_START: compare(profile, Profile.of(now)),
    }
