"""One model of the server and its hot swap.

A new version is loaded and warmed up beside the current one. Then one assignment activates it, so
every request is answered by exactly one version. Requests in flight keep the version they started
with; its memory is freed after the last of them. Where memory is limited a model may be unloaded
until it is requested; see `model_cache`.

If a device has no memory for both versions, the current one ends first: it takes no new requests,
those in flight end, and then the new version is loaded. Requests meanwhile get 503. If the new one
does not fit even so, the old one is loaded again.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

from mlflow_pt_deploy.errors import DeviceMemoryError, PtDeployError, root_cause
from mlflow_pt_deploy.registry.addresses import (
    ModelSpec,
    ResolvedVersion,
    ServedVersion,
    SpecProvider,
    resolve,
    without_password,
)
from mlflow_pt_deploy.registry.outage import answer_within, is_outage
from mlflow_pt_deploy.registry.refusal import REFUSED_TAG, note_refusal
from mlflow_pt_deploy.registry.served_copy import ServedCopies
from mlflow_pt_deploy.serving.batching.executor import ModelExecutor
from mlflow_pt_deploy.serving.lifecycle.device_swap import (
    clear_frames,
    free_memory,
    load_patiently,
    wait_until_freed,
)
from mlflow_pt_deploy.serving.lifecycle.local_copy import LocalCopy
from mlflow_pt_deploy.serving.lifecycle.version_records import (
    CountedVersion,
    EvictionNote,
    Preparation,
    RejectedVersion,
)
from mlflow_pt_deploy.serving.model.loaded_model import LoadedModel, check_exists, load_version
from mlflow_pt_deploy.serving.model.prediction_cache import PredictionCache
from mlflow_pt_deploy.serving.model.version_counts import VersionCounts
from mlflow_pt_deploy.serving.observability.metrics import Metrics
from mlflow_pt_deploy.system.clock import now
from mlflow_pt_deploy.system.device import CPU

RETRY_S, MAX_RETRY_S = 60.0, 3600.0
MAX_COUNTED = 20
DECIDE_S = 8.0
"""Seconds that the registry has to answer before a local copy serves."""

_logger = logging.getLogger(__name__)


class ServedModel:
    """A model under its name.

    Args:
        name: Part of the path ``/models/NAME/invocations``.
        provider: Returns the specification that is to be served now.
        metrics: Counts swaps and rejections.
        last_served: The version that another worker served under this name; it is opened first.
        copies: Local copies, for a start while the registry is down; None: none are kept.
        cache_mb: MB of predictions that are kept for rows that come again; 0: none.
        grace_s: Most seconds for requests in flight if the current version has to end first.
        find: Resolves a URI to a version.
        load: Loads a version, or raises.
        note: Notes in the registry why a version was rejected; an empty reason removes the note.

    Attributes:
        current: The version that answers; None before the first is ready, and while unloaded.
        unloaded: Why no version is in memory although none was rejected, or None.
        rejected: The version that is wanted but cannot serve, or None.
        preparing: The version that is being loaded, or None.
        ended: The version that ended for one that does not fit beside it, until one serves.
        uri: The URI that `current` was resolved from.
        registry_down_since: Since when the registry has not answered; None while it does.
        registry_error: The registry's last error.
        polls: Number of polls of the registry.
        used_at: Time of the last request, by `time.perf_counter`, seconds.
        requested_at: Time of the first request since it was unloaded; 0: there is none.
        loaded_at: When the current version was loaded, by `time.perf_counter`.
        load_s: Seconds that the load took.
        wake: Called when it is requested while it is unloaded.
        counts: What each version answered, by label; the oldest beyond `MAX_COUNTED` are dropped.
        counted: These versions.
    """

    def __init__(
        self,
        name: str,
        provider: SpecProvider,
        *,
        metrics: Metrics | None = None,
        last_served: ServedVersion | None = None,
        copies: ServedCopies | None = None,
        cache_mb: float = 0.0,
        grace_s: float = 30.0,
        find: Callable[[str], ResolvedVersion] = resolve,
        load: Callable[[ResolvedVersion, ModelSpec], LoadedModel] = load_version,
        note: Callable[[ResolvedVersion, str], None] = note_refusal,
    ) -> None:
        self.name = name
        self.current: LoadedModel | None = None
        self.rejected: RejectedVersion | None = None
        self.preparing: Preparation | None = None
        self.ended: ServedVersion | None = None
        self.registry_down_since: str | None = None
        self.registry_error = ""
        self.uri = ""
        self.polls = 0
        self.unloaded: EvictionNote | None = None
        self.used_at = self.requested_at = self.loaded_at = self.load_s = 0.0
        self.wake: Callable[[], None] = lambda: None
        self.counts: dict[str, VersionCounts] = {}
        self._counting = threading.Lock()
        self.counted: dict[str, CountedVersion] = {}
        self._unloaded_version: ResolvedVersion | None = None
        self._executors: tuple[weakref.ref[ModelExecutor], ...] = ()
        self._provider = provider
        self._metrics = metrics or Metrics()
        self._last_served = last_served
        self._cache_mb = cache_mb
        self._grace_s = grace_s
        self._copy = LocalCopy(name, copies, _explain)
        self._find = find
        self._load = load
        self._note = note

    def open(self) -> None:
        """Load the first version: the one that was served before, or the one wanted now.

        If the registry does not answer, a local copy of what served last is loaded.

        Raises:
            PtDeployError: The version cannot serve.
            MlflowException: It cannot be found or fetched.
        """
        if self._open_copy():
            return
        if self._last_served is not None:
            self._try(self._last_served.version, self._last_served.spec)
        if self.current is None:
            spec, version = self._wanted()
            self._activate(self._prepare(version, spec), 0.0)

    def register_unloaded(self, reason: str) -> None:
        """Check that the wanted version exists; it is loaded on the first request.

        Raises:
            PtDeployError: The specification or the MLmodel file cannot be read.
            MlflowException: There is no such model.
        """
        try:
            spec, version = self._wanted()
            check_exists(version)
        except Exception as error:
            spec = self._provider()
            copy = self._copy.find(spec.uri) if is_outage(error) else None
            if copy is None:
                raise
            self._mark_registry_down(error)
            version = copy.version
        self.uri, self._unloaded_version = spec.uri, version
        self.unloaded = EvictionNote(now(), reason)

    def keep_copy(self) -> None:
        """Copy the current version for a start while the registry is down; never raises."""
        self._copy.keep(self.uri, self.current)

    @property
    def running_s(self) -> float:
        """Seconds since the oldest running batch of any version began; 0 if none is running.

        Versions that were replaced or unloaded count as long as a batch of theirs is running.
        """
        executors = [reference() for reference in self._executors]
        return max((each.running_s for each in executors if each is not None), default=0.0)

    def acquire(self) -> LoadedModel | None:
        """The version for a request; None if none is in memory, it is then loaded soon."""
        self.used_at = time.perf_counter()
        version = self.current
        if version is None and self.unloaded and not self.requested_at:
            blocked = self.rejected is not None and self.rejected.remaining_s > 0
            if not blocked:
                self.requested_at = self.used_at
                self.wake()
        return version

    def unload(self, reason: str) -> Callable[[], LoadedModel | None]:
        """Drop the version; requests in flight keep it until they are answered.

        Returns:
            A weak reference; it returns None once the version is freed.
        """
        version = self.current
        if version is None:  # it has just ended for another one
            return lambda: None
        self._unloaded_version = version.resolved
        self.unloaded = EvictionNote(now(), reason)
        self.current = None
        self._metrics.version_unloaded(self.name)
        _logger.info("%s: version %s was unloaded: %s", self.name, version.label, reason)
        return weakref.ref(version)

    def reload(self) -> None:
        """Load an unloaded model in the version that is wanted now; never raises."""
        try:
            self._poll(load=True)
        finally:
            self.requested_at = 0.0

    def poll(self) -> None:
        """Look the wanted version up in the registry and swap to it; never raises.

        If the registry does not answer, the current version stays. For an unloaded model only the
        wanted version is recorded.
        """
        try:
            self._poll(load=self.unloaded is None)
        finally:
            self.polls += 1

    def count(self, version: LoadedModel) -> None:
        """Let a version continue the counts of its label."""
        service = version.pyfunc.service
        with self._counting:
            counts = dict(self.counts)
            counts[version.label] = service.counts = counts.pop(version.label, service.counts)
            if self.current and self.current.label in counts:  # the oldest are dropped below
                counts[self.current.label] = counts.pop(self.current.label)
            counted = CountedVersion(version.resolved, service.loaded.labels)
            known = self.counted | {version.label: counted}
            # one assignment each: the monitor's thread iterates over the dicts
            self.counts = dict(list(counts.items())[-MAX_COUNTED:])
            self.counted = {label: known[label] for label in self.counts}

    def status(self) -> dict[str, Any]:
        """The content of ``/model``."""
        version = self.current
        return {
            "model": self.name,
            "uri": self.uri,
            **(version.status() if version else self._unloaded_status()),
            "unloaded": self.unloaded._asdict() if self.unloaded else None,
            "refused": self.rejected.status() if self.rejected else None,
            "preparing": self.preparing._asdict() if self.preparing else None,
            "registry_lost_since": self.registry_down_since,
            "registry_error": self.registry_error or None,
            "looks": self.polls,
        }

    def _poll(self, *, load: bool) -> None:
        try:
            spec, version = self._wanted()
        except Exception as error:
            self._mark_registry_down(error)
            if load and self.current is None and is_outage(error):
                self._serve_copy(error)
            return
        if self.registry_down_since:
            _logger.info("%s: the registry answers again", self.name)
            self.registry_down_since, self.registry_error = None, ""
            self._metrics.registry_reachable(self.name, True)
        if self.current and self.current.matches(version, spec):
            self.uri, self.rejected = spec.uri, None
        elif self._is_blocked(version, spec):
            self._restore()
        elif load:
            self._try(version, spec)
        else:
            self.uri, self._unloaded_version, self.rejected = spec.uri, version, None

    def _unloaded_status(self) -> dict[str, Any]:
        version = self._unloaded_version
        return {"registered_model": version.name, "version": version.version} if version else {}

    def _wanted(self) -> tuple[ModelSpec, ResolvedVersion]:
        spec = self._provider()
        if self.current is None and self._copy.find(spec.uri):
            return spec, answer_within(DECIDE_S, partial(self._find, spec.uri))
        return spec, self._find(spec.uri)

    def _open_copy(self) -> bool:
        """Serve the local copy if there is one and the registry does not answer."""
        if self._copy.find(self._provider().uri) is None:
            return False
        try:
            self._wanted()
        except Exception as error:
            return is_outage(error) and self._serve_copy(error)
        return False

    def _serve_copy(self, outage: Exception) -> bool:
        """Serve the local copy; False if there is none that can."""
        start = time.perf_counter()
        version = self._copy.load(self._provider())
        if version is None:
            return False
        self._activate(version, time.perf_counter() - start)
        self._mark_registry_down(outage)
        self._metrics.registry_reachable(self.name, False)  # an activation says that it answers
        _logger.warning(
            "%s: the registry does not answer; version %s is served from the copy of %s",
            self.name,
            version.label,
            version.copied_at,
        )
        return True

    def _mark_registry_down(self, error: Exception) -> None:
        cause = _explain(error)
        if self.registry_down_since and cause == self.registry_error:
            return
        self.registry_down_since = self.registry_down_since or now()
        self.registry_error = cause
        self._metrics.registry_reachable(self.name, False)
        _logger.warning(
            "%s: the wanted version cannot be looked up; version %s stays: %s",
            self.name,
            self.current.label if self.current else "none",
            cause,
        )

    def _rejection(self, version: ResolvedVersion, spec: ModelSpec) -> RejectedVersion | None:
        """The rejection of this version, if it is the one that was rejected."""
        found = self.rejected
        return found if found and (found.version, found.spec) == (version, spec) else None

    def _is_blocked(self, version: ResolvedVersion, spec: ModelSpec) -> bool:
        found = self._rejection(version, spec)
        return found is not None and found.remaining_s > 0

    def _prepare(self, version: ResolvedVersion, spec: ModelSpec) -> LoadedModel:
        """Load a version; `preparing` is set meanwhile."""
        self.preparing = Preparation(version.version, now())
        try:
            return self._load(version, spec)
        finally:
            self.preparing = None

    def _try(self, version: ResolvedVersion, spec: ModelSpec) -> None:
        start = time.perf_counter()
        _logger.info("%s: version %s is being prepared", self.name, version.version)
        try:
            loaded = self._prepare(version, spec)
        except Exception as error:
            if not self._should_end(version, spec, error):
                self._reject(version, spec, error)
                return
        else:
            self._activate(loaded, time.perf_counter() - start)
            return
        self._load_in_place(version, spec)  # not within `except`: its frames hold what was loaded

    def _should_end(self, version: ResolvedVersion, spec: ModelSpec, error: Exception) -> bool:
        """Whether the current version is to end, so that another one may fit the device."""
        current, before = self.current, self._rejection(version, spec)
        if current is None or current.pyfunc.loaded.device == CPU:
            return False
        tried = before is not None and before.alone
        return isinstance(error, DeviceMemoryError) and not tried

    def _load_in_place(self, version: ResolvedVersion, spec: ModelSpec) -> None:
        """End the current version and load another one; if that fails, the old one again."""
        start = time.perf_counter()
        ended = self._end(version)
        if ended is None:
            return
        serving, executor = ended
        freed = wait_until_freed(serving, executor, self._grace_s)
        if not freed and (old := serving()):
            self.current, self.ended = old, None
            reason = (
                f"the device has no memory for two versions, and the requests of version "
                f"{old.label} did not end within {self._grace_s:g} s"
            )
            self._reject(version, spec, DeviceMemoryError(reason), alone=True)
            return
        try:
            loaded = load_patiently(partial(self._prepare, version, spec))
        except Exception as error:
            clear_frames(error)
            failure = error
        else:
            self._activate(loaded, time.perf_counter() - start)
            return
        self._restore()
        self._reject(version, spec, failure, alone=True)

    def _end(
        self, version: ResolvedVersion
    ) -> tuple[weakref.ref[LoadedModel], weakref.ref[ModelExecutor]] | None:
        """Give the current version to no new request.

        Returns:
            What holds its memory; None if it was evicted meanwhile.
        """
        current = self.current
        if current is None:
            return None
        self.ended = ServedVersion(current.spec, current.resolved)
        self._unloaded_version = current.resolved
        self.current = None  # after `ended`, which says why
        _logger.warning(
            "%s: the device has no memory for versions %s and %s; %s ends before %s is loaded",
            self.name,
            current.label,
            version.version,
            current.label,
            version.version,
        )
        executor = current.pyfunc.service.batcher.executor
        return weakref.ref(current), weakref.ref(executor)

    def _restore(self) -> None:
        """Load the version again that ended for one that cannot serve; never raises."""
        start, rejected, ended = time.perf_counter(), self.rejected, self.ended
        if ended is None:
            return
        free_memory()
        try:
            loaded = load_patiently(partial(self._prepare, ended.version, ended.spec))
        except Exception as error:
            _logger.error(
                "%s: version %s, which ended, cannot be loaded again until the next poll: %s",
                self.name,
                ended.version.version,
                _explain(error),
            )
        else:
            self._activate(loaded, time.perf_counter() - start)
            self.rejected = rejected

    def _activate(self, version: LoadedModel, seconds: float) -> None:
        if self._cache_mb:
            version.pyfunc.service.cache = PredictionCache(self._cache_mb)
        self._metrics.version_activated(self.name, version, seconds)
        self.count(version)
        live = (reference for reference in self._executors if reference() is not None)
        self._executors = (*live, weakref.ref(version.pyfunc.service.batcher.executor))
        self.loaded_at, self.load_s = time.perf_counter(), seconds
        self.used_at = self.used_at or self.loaded_at
        before, self.current = self.current, version
        self.uri, self.rejected, self.ended = version.spec.uri, None, None
        if REFUSED_TAG in version.tags:
            self._note(version.resolved, "")
        if self.unloaded:
            self.unloaded = None  # after `current`: /readyz succeeds if either is set
            _logger.info("%s: version %s was loaded in %.1f s", self.name, version.label, seconds)
        if before:
            _logger.info(
                "%s: version %s replaced %s after %.1f s of preparation",
                self.name,
                version.label,
                before.label,
                seconds,
            )

    def _reject(
        self, version: ResolvedVersion, spec: ModelSpec, error: Exception, *, alone: bool = False
    ) -> None:
        before = self._rejection(version, spec)
        retry_s = min(before.retry_s * 2, MAX_RETRY_S) if before else RETRY_S
        since = before.since if before else now()
        alone = alone or (before is not None and before.alone)
        reason, tried_at = _explain(error), time.monotonic()
        self.rejected = RejectedVersion(version, spec, reason, since, retry_s, tried_at, alone)
        self._metrics.version_rejected(self.name)
        if before is None:
            self._note(version, reason)
        known = isinstance(error, PtDeployError)
        _logger.error(
            "%s: version %s was rejected, version %s stays; next try in %.0f s or when another "
            "version is wanted: %s",
            self.name,
            version.version,
            self.current.label if self.current else "none",
            retry_s,
            reason,
            exc_info=None if known else error,
        )


def _explain(error: Exception) -> str:
    """The message of our own error, or the root cause of a library's, without passwords."""
    if isinstance(error, PtDeployError):
        return str(error)
    return f"{type(error).__name__}: {without_password(root_cause(error))}"
