"""A place in the server: the version that answers there, and how another takes over.

The new version is made ready beside the old one; then one assignment decides, so every request
has exactly one version. Requests in flight keep theirs, and with the last of them it is freed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlflow_pt_deploy.errors import PtDeployError
from mlflow_pt_deploy.serving.metrics import Metrics
from mlflow_pt_deploy.serving.registry import Address, Source, Target, resolve
from mlflow_pt_deploy.serving.version import Version, load_version, now

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
    def stands(self) -> bool:
        """Whether it is too early to try again."""
        return time.monotonic() < self.tried + self.pause_s

    def about(self) -> dict[str, Any]:
        """What ``/model`` says of it."""
        return {
            "uri": self.target.uri,
            "version": self.address.version,
            "model_config": dict(self.target.model_config),
            "reason": self.reason,
            "since": self.since,
            "tried_again_in_s": max(0, round(self.tried + self.pause_s - time.monotonic())),
        }


class Slot:
    """One model of the server, under its name.

    Args:
        name: Its part of the path ``/models/NAME/invocations``.
        source: Says what is to be served.
        metrics: Told of swaps and refusals.
        find: Makes a version's address of a URI.
        load: Makes a version ready, or raises.

    Attributes:
        current: The version that answers; None until the first is ready.
        refused: The version that should serve but may not, or None.
        uri: What `current` was asked for as.
        lost: Since when the registry has not answered, or None while it does.
        looks: How often was looked what is wanted.
    """

    def __init__(
        self,
        name: str,
        source: Source,
        *,
        metrics: Metrics | None = None,
        find: Callable[[str], Address] = resolve,
        load: Callable[[Address, Target], Version] = load_version,
    ) -> None:
        self.name = name
        self.current: Version | None = None
        self.refused: Refusal | None = None
        self.lost: str | None = None
        self.uri = ""
        self.looks = 0
        self._source = source
        self._metrics = metrics or Metrics()
        self._find = find
        self._load = load

    def open(self) -> None:
        """Load the first version.

        Raises:
            PtDeployError: It may not serve.
            MlflowException: It cannot be found or fetched.
        """
        target, address = self._wanted()
        self._take_over(self._load(address, target), 0.0)

    def look(self) -> None:
        """See what is wanted now, and serve it if it is fit to; never raises for a bad version.

        A registry that does not answer changes nothing; it is logged once.
        """
        try:
            self._look()
        finally:
            self.looks += 1

    def _look(self) -> None:
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
        elif not self._refused_already(address, target):
            self._try(address, target)

    def about(self) -> dict[str, Any]:
        """What ``/model`` answers."""
        version = self.current
        return {
            "model": self.name,
            "uri": self.uri,
            **(version.about() if version else {}),
            "refused": self.refused.about() if self.refused else None,
            "registry_lost_since": self.lost,
            "looks": self.looks,
        }

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
        return same and refused.stands  # type: ignore[union-attr]

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
        before, self.current = self.current, version
        self.uri, self.refused = version.target.uri, None
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
