"""A place in the server: the version that answers there, and how another takes over.

The new version is made ready beside the old one; then one assignment decides, so every request
has exactly one version. Requests in flight keep theirs, and with the last of them it is freed.
Where memory is limited, a slot may be empty until it is asked for; `keeper` says when.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from mlflow_pt_deploy.errors import PtDeployError
from mlflow_pt_deploy.registry.addresses import Address, Served, Source, Target, resolve
from mlflow_pt_deploy.serving.model.loaded_model import Version, check_there, load_version, now
from mlflow_pt_deploy.serving.observability.metrics import Metrics

RETRY_S, RETRY_MOST_S = 60.0, 3600.0

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Refusal:
    """A version that may not serve.

    Attributes:
        address: The version.
        target: What was asked for.
        reason: Why, in words.
        since: When it was refused first.
        pause_s: Seconds until it is tried again; doubles each time.
        tried: When it was tried last, by `time.monotonic`.
    """

    address: Address
    target: Target
    reason: str
    since: str
    pause_s: float
    tried: float

    @property
    def left_s(self) -> float:
        """Seconds until it is tried again; 0: it may be at once."""
        return max(0.0, self.tried + self.pause_s - time.monotonic())

    def about(self) -> dict[str, Any]:
        """What ``/model`` says of it."""
        return {
            "uri": self.target.uri,
            "version": self.address.version,
            "model_config": dict(self.target.model_config),
            "reason": self.reason,
            "since": self.since,
            "tried_again_in_s": round(self.left_s),
        }


class Unloaded(NamedTuple):
    """Why a model is not in memory, and since when."""

    since: str
    reason: str


class Slot:
    """One model of the server, under its name.

    Args:
        name: Its part of the path ``/models/NAME/invocations``.
        source: Says what is to be served.
        metrics: Told of swaps and refusals.
        before: What answered before, where this takes the place of another process.
        find: Makes a version's address of a URI.
        load: Makes a version ready, or raises.

    Attributes:
        current: The version that answers; None until the first is ready, and while unloaded.
        unloaded: Why there is none though all is well, or None.
        refused: The version that should serve but may not, or None.
        uri: What `current` was asked for as.
        lost: Since when the registry has not answered, or None while it does.
        looks: How often was looked what is wanted.
        used: When it was asked for last, by `time.perf_counter` as the next two.
        asked: Since when somebody has waited for it to be loaded again; 0: nobody does.
        loaded: When its version was loaded.
        took_s: How many seconds that took.
        wake: Called when it is asked for while it is unloaded.
    """

    def __init__(
        self,
        name: str,
        source: Source,
        *,
        metrics: Metrics | None = None,
        before: Served | None = None,
        find: Callable[[str], Address] = resolve,
        load: Callable[[Address, Target], Version] = load_version,
    ) -> None:
        self.name = name
        self.current: Version | None = None
        self.refused: Refusal | None = None
        self.lost: str | None = None
        self.uri = ""
        self.looks = 0
        self.unloaded: Unloaded | None = None
        self.used = self.asked = self.loaded = self.took_s = 0.0
        self.wake: Callable[[], None] = lambda: None
        self._noted: Address | None = None
        self._source = source
        self._metrics = metrics or Metrics()
        self._before = before
        self._find = find
        self._load = load

    def open(self) -> None:
        """Load the first version: what answered before, or else what is wanted now.

        Raises:
            PtDeployError: It may not serve.
            MlflowException: It cannot be found or fetched.
        """
        if self._before is not None:
            self._try(self._before.address, self._before.target)
        if self.current is None:
            target, address = self._wanted()
            self._take_over(self._load(address, target), 0.0)

    def defer(self, reason: str) -> None:
        """Make sure that there is something to load, and leave it until it is asked for.

        Raises:
            PtDeployError: What is to be served cannot be read.
            MlflowException: There is no such model.
        """
        target, address = self._wanted()
        check_there(address)
        self.uri, self._noted = target.uri, address
        self.unloaded = Unloaded(now(), reason)

    def ask(self) -> Version | None:
        """The version for a request; None: none is in memory, and one is sent for if it may be."""
        self.used = time.perf_counter()
        version = self.current
        refused = self.refused is not None and self.refused.left_s > 0
        if version is None and self.unloaded and not self.asked and not refused:
            self.asked = self.used
            self.wake()
        return version

    def unload(self, reason: str) -> Callable[[], Version | None]:
        """Let the version go; requests in flight keep it until they are answered.

        Returns:
            A weak reference: None once it is freed.
        """
        version = self.current
        assert version is not None
        self._noted, self.unloaded = version.address, Unloaded(now(), reason)
        self.current = None
        self._metrics.unloaded(self.name)
        _logger.info("%s: version %s was unloaded: %s", self.name, version.label, reason)
        return weakref.ref(version)

    def reload(self) -> None:
        """Load what was unloaded, in the version that is wanted now; as `look`, never raises."""
        try:
            self._look(load=True)
        finally:
            self.asked = 0.0

    def look(self) -> None:
        """See what is wanted now, and serve it if it is fit to; never raises for a bad version.

        A registry that does not answer changes nothing; it is logged once. Of a model that is
        unloaded only its address is noted.
        """
        try:
            self._look(load=self.unloaded is None)
        finally:
            self.looks += 1

    def _look(self, *, load: bool) -> None:
        try:
            target, address = self._wanted()
        except Exception as error:
            self._lose(error)
            return
        if self.lost:
            _logger.info("%s: the registry answers again", self.name)
            self.lost = None
            self._metrics.registry(self.name, True)
        if self.current and self.current.serves(address, target):
            self.uri, self.refused = target.uri, None
        elif self._refused_already(address, target):
            return
        elif load:
            self._try(address, target)
        else:
            self.uri, self._noted, self.refused = target.uri, address, None

    def about(self) -> dict[str, Any]:
        """What ``/model`` answers."""
        version = self.current
        return {
            "model": self.name,
            "uri": self.uri,
            **(version.about() if version else self._absent()),
            "unloaded": self.unloaded._asdict() if self.unloaded else None,
            "refused": self.refused.about() if self.refused else None,
            "registry_lost_since": self.lost,
            "looks": self.looks,
        }

    def _absent(self) -> dict[str, Any]:
        address = self._noted
        return {"registered_model": address.name, "version": address.version} if address else {}

    def _wanted(self) -> tuple[Target, Address]:
        target = self._source()
        return target, self._find(target.uri)

    def _lose(self, error: Exception) -> None:
        if self.lost:
            return
        self.lost = now()
        self._metrics.registry(self.name, False)
        label = self.current.label if self.current else "none"
        _logger.warning(
            "%s: cannot find out what to serve (%s); version %s stays. Told once.",
            self.name,
            _reason(error),
            label,
        )

    def _refused_already(self, address: Address, target: Target) -> bool:
        refused = self.refused
        same = refused is not None and (refused.address, refused.target) == (address, target)
        return same and refused.left_s > 0  # type: ignore[union-attr]

    def _try(self, address: Address, target: Target) -> None:
        start = time.perf_counter()
        try:
            version = self._load(address, target)
        except Exception as error:
            self._refuse(address, target, error)
        else:
            self._take_over(version, time.perf_counter() - start)

    def _take_over(self, version: Version, seconds: float) -> None:
        self._metrics.swapped(self.name, version, seconds)
        self.loaded, self.took_s = time.perf_counter(), seconds
        self.used = self.used or self.loaded
        before, self.current = self.current, version
        self.uri, self.refused = version.target.uri, None
        if self.unloaded:
            self.unloaded = None  # after `current`: a slot is ready all the time
            _logger.info("%s: version %s was loaded in %.1f s", self.name, version.label, seconds)
        if before:
            _logger.info(
                "%s: version %s took over from %s after %.1f s of preparation",
                self.name,
                version.label,
                before.label,
                seconds,
            )

    def _refuse(self, address: Address, target: Target, error: Exception) -> None:
        before = self.refused
        again = before is not None and (before.address, before.target) == (address, target)
        pause = min(before.pause_s * 2, RETRY_MOST_S) if before and again else RETRY_S
        since = before.since if before and again else now()
        reason = _reason(error)
        self.refused = Refusal(address, target, reason, since, pause, time.monotonic())
        self._metrics.refused(self.name)
        known = isinstance(error, PtDeployError)
        _logger.error(
            "%s: version %s is refused, version %s stays; tried again in %.0f s or when another is "
            "named: %s",
            self.name,
            address.version,
            self.current.label if self.current else "none",
            pause,
            reason,
            exc_info=None if known else error,
        )


def _reason(error: Exception) -> str:
    """Our own words, or only the kind of an error whose words may hold paths and secrets."""
    return (
        str(error) if isinstance(error, PtDeployError) else f"{type(error).__name__}, see the log"
    )
