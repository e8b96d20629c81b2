"""How much of what is served may be in memory, and which model goes when it is too much; pure.

Knows neither slots nor how memory is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mlflow_pt_deploy.errors import ServingError

# Two models that are asked for in turns would else do nothing but take each other's place.
STAY_S = 5.0


@dataclass(frozen=True)
class Room:
    """The limits of a server.

    Attributes:
        max_models: Most models in memory; 0: no limit.
        max_memory_mb: Models go while the process's resident memory is above this and more than
            one is loaded; 0: no limit.
    """

    max_models: int = 0
    max_memory_mb: float = 0.0

    def __post_init__(self) -> None:
        for name in ("max_models", "max_memory_mb"):
            if not getattr(self, name) >= 0:
                raise ServingError(f"{name} is {getattr(self, name)}; give 0 (no limit) or more")

    def excess(self, models: int, resident_mb: float = 0.0) -> str:
        """Why this many loaded models are too many, in words; empty where they are not."""
        if self.max_models and models > self.max_models:
            return f"max_models is {self.max_models}"
        if self.max_memory_mb and models > 1 and resident_mb > self.max_memory_mb:
            return f"{resident_mb:.0f} MB were resident, max_memory_mb is {self.max_memory_mb:g}"
        return ""


class Loaded(NamedTuple):
    """A model in memory; times are in seconds of one clock.

    Attributes:
        name: Its slot's.
        used: When it was asked for last.
        since: When it was loaded.
        took_s: How long that took.
    """

    name: str
    used: float
    since: float
    took_s: float = 0.0

    def may_go(self, now: float) -> bool:
        """Whether it has been there for `STAY_S`, and for as long as it took to load."""
        return now >= self.since + max(STAY_S, self.took_s)


def longest_unused(loaded: Sequence[Loaded], now: float) -> str | None:
    """The model that goes first; None: none may go yet."""
    free = [model for model in loaded if model.may_go(now)]
    return min(free, key=lambda model: model.used).name if free else None
