"""What is known of versions that were counted, rejected, evicted, or are being prepared."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mlflow_pt_deploy.registry.addresses import ModelSpec, ResolvedVersion


class CountedVersion(NamedTuple):
    """A version whose answers are counted, also after it was replaced.

    Attributes:
        resolved: Its place in the registry.
        labels: Its classes.
    """

    resolved: ResolvedVersion
    labels: Sequence[str]


@dataclass(frozen=True)
class RejectedVersion:
    """A version that cannot serve.

    Attributes:
        version: The version.
        spec: The specification it was loaded for.
        reason: Why it was rejected.
        since: Time of the first rejection.
        retry_s: Seconds until the next try; doubles each time.
        tried_at: Time of the last try, by `time.monotonic`, seconds.
        alone: Whether the current version was ended for it, in vain; that is done once.
    """

    version: ResolvedVersion
    spec: ModelSpec
    reason: str
    since: str
    retry_s: float
    tried_at: float
    alone: bool = False

    @property
    def remaining_s(self) -> float:
        """Seconds until the next try."""
        return max(0.0, self.tried_at + self.retry_s - time.monotonic())

    def status(self) -> dict[str, Any]:
        """Its entry in ``/model``."""
        return {
            "uri": self.spec.uri,
            "version": self.version.version,
            "model_config": dict(self.spec.model_config),
            "reason": self.reason,
            "since": self.since,
            "tried_again_in_s": round(self.remaining_s),
        }


class EvictionNote(NamedTuple):
    """Since when a model is not in memory, and why."""

    since: str
    reason: str


class Preparation(NamedTuple):
    """A version that is being fetched and loaded, and since when."""

    version: str | None
    since: str
