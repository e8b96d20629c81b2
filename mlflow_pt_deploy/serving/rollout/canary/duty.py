"""Ends canaries that break a guardrail, once for all workers of a server."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mlflow_pt_deploy.registry.canary import note_canary_ended
from mlflow_pt_deploy.serving.model.version_counts import VersionCounts
from mlflow_pt_deploy.serving.monitoring.monitor import Duty, ServerCounts
from mlflow_pt_deploy.serving.rollout.canary.canary import Canary
from mlflow_pt_deploy.serving.rollout.canary.endings import Endings
from mlflow_pt_deploy.serving.rollout.canary.guardrails import broken
from mlflow_pt_deploy.serving.rollout.canary.limits import Limits
from mlflow_pt_deploy.serving.rollout.canary.running_canary import RunningCanary

WINDOW_S = 30.0
TAG_RETRY_S = 60.0


class _Snapshot(NamedTuple):
    """Counts since the server started; `at` by `time.monotonic`, seconds."""

    at: float
    champion: VersionCounts
    canary: VersionCounts


class Window:
    """What two versions did in the last `WINDOW_S` seconds.

    Args:
        pair: Labels of champion and canary, and when the canary started.
    """

    def __init__(self, pair: tuple[str, str, str]) -> None:
        self.pair = pair
        self._snapshots: deque[_Snapshot] = deque()

    def add(
        self, at: float, champion: VersionCounts, canary: VersionCounts
    ) -> tuple[VersionCounts, VersionCounts]:
        """Add counts since the server started; returns those within the window."""
        self._snapshots.append(_Snapshot(at, champion, canary))
        while self._snapshots[0].at < at - WINDOW_S:
            self._snapshots.popleft()
        oldest = self._snapshots[0]
        return champion.plus(oldest.champion, -1), canary.plus(oldest.canary, -1)


class CanaryDuty(Duty):
    """See `monitor.Duty`.

    Args:
        canaries: By model.
        endings: Why canaries were ended.
        limits: What a canary may do.
    """

    def __init__(self, canaries: Mapping[str, Canary], endings: Endings, limits: Limits) -> None:
        self._canaries = canaries
        self._endings = endings
        self._limits = limits
        self._windows: dict[str, Window] = {}
        self._tagger = threading.Thread()
        self._tagged_at = -TAG_RETRY_S

    def follow(self) -> None:
        """See `monitor.Duty`."""
        for canary in self._canaries.values():
            canary.follow()

    def lead(self, counts: ServerCounts) -> None:
        """See `monitor.Duty`."""
        for name, canary in self._canaries.items():
            running = canary.running
            if running is None:
                self._windows.pop(name, None)
            elif reason := self._judge(name, canary, running, counts.get(name, {})):
                canary.end(reason)
                self._tagged_at = -TAG_RETRY_S
        self._tag()

    def _judge(
        self,
        name: str,
        canary: Canary,
        running: RunningCanary,
        counts: Mapping[str, VersionCounts],
    ) -> str:
        champion = canary.champion
        if champion is None or champion.label != running.champion:
            return ""
        pair = (champion.label, running.label, running.since)
        window = self._windows.get(name)
        if window is None or window.pair != pair:
            window = self._windows[name] = Window(pair)
        theirs, mine = window.add(
            time.monotonic(),
            counts.get(champion.label, VersionCounts()),
            counts.get(running.label, VersionCounts()),
        )
        names = champion.pyfunc.loaded.labels, running.version.pyfunc.loaded.labels
        mine.labels = reordered(mine.labels, *names)
        return broken(theirs, mine, self._limits)

    def _tag(self) -> None:
        """Write tags that are missing in the registry, on a thread: it may not answer for long."""
        missing = [each for each in self._endings.all() if not each[1].tagged]
        waits = time.monotonic() < self._tagged_at + TAG_RETRY_S
        if not missing or waits or self._tagger.is_alive():
            return
        self._tagged_at = time.monotonic()
        self._tagger = threading.Thread(
            target=self._write_tags, args=[[name for name, _ in missing]], daemon=True
        )
        self._tagger.start()

    def _write_tags(self, names: Sequence[str]) -> None:
        for name, ending in self._endings.all():
            champion = self._canaries[name].champion
            registered = champion.resolved.name if champion else None
            if name not in names or ending.tagged or registered is None:
                continue
            if note_canary_ended(registered, ending.version, ending.text):
                self._endings.write(name, ending._replace(tagged=True))


def reordered(counts: Sequence[int], champion: Sequence[str], canary: Sequence[str]) -> list[int]:
    """Counts by the canary's classes in the order of the champion's.

    Args:
        counts: By class; classes at the end may be missing.
        champion, canary: Names of the classes.
    """
    by_name = dict(zip(canary, counts, strict=False))
    return [by_name.get(name, 0) for name in champion]
