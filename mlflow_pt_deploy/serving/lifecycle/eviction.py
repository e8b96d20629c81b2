"""Memory budget of loaded models, and the choice of the model to evict; pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mlflow_pt_deploy.errors import ServingError

MIN_RESIDENCY_S = 5.0
"""Seconds that a model stays in memory at least. Otherwise two models that are requested
alternately would evict each other all the time."""


@dataclass(frozen=True)
class MemoryBudget:
    """Limits of models in memory.

    Attributes:
        max_models: Most models in memory; 0: no limit.
        max_memory_mb: Models are evicted while the process's resident memory is above this and more
            than one is loaded; 0: no limit.
    """

    max_models: int = 0
    max_memory_mb: float = 0.0

    def __post_init__(self) -> None:
        for name in ("max_models", "max_memory_mb"):
            if not getattr(self, name) >= 0:
                raise ServingError(f"{name} is {getattr(self, name)}; give 0 (no limit) or more")

    def excess(self, models: int, resident_mb: float = 0.0) -> str:
        """Reason why this many loaded models exceed the budget; empty if they do not."""
        if self.max_models and models > self.max_models:
            return f"max_models is {self.max_models}"
        if self.max_memory_mb and models > 1 and resident_mb > self.max_memory_mb:
            return f"{resident_mb:.0f} MB were resident, max_memory_mb is {self.max_memory_mb:g}"
        return ""


class CacheEntry(NamedTuple):
    """A model in memory; times in seconds of one clock.

    Attributes:
        name: Name of the model.
        used_at: Time of the last request.
        loaded_at: Time of the load.
        load_s: Duration of the load.
    """

    name: str
    used_at: float
    loaded_at: float
    load_s: float = 0.0

    def may_be_evicted(self, now: float) -> bool:
        """Whether it has been in memory for `MIN_RESIDENCY_S` and for at least its load time."""
        return now >= self.loaded_at + max(MIN_RESIDENCY_S, self.load_s)


def least_recently_used(entries: Sequence[CacheEntry], now: float) -> str | None:
    """The model to evict first; None if none may be evicted yet."""
    candidates = [entry for entry in entries if entry.may_be_evicted(now)]
    return min(candidates, key=lambda entry: entry.used_at).name if candidates else None
