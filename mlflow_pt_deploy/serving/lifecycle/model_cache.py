"""LRU cache of loaded models.

Loads models on demand and evicts the least recently used one when `max_models` or `max_memory_mb`
is exceeded. Runs on the registry watcher's thread only. During a hot swap the old and the new
version are both in memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from mlflow_pt_deploy.serving.lifecycle.eviction import (
    CacheEntry,
    MemoryBudget,
    least_recently_used,
)
from mlflow_pt_deploy.serving.lifecycle.served_model import ServedModel
from mlflow_pt_deploy.system.process_memory import resident_mb, trim


class ModelCache:
    """Keeps models within a memory budget.

    Args:
        models: All models of the server; the first are loaded first.
        budget: The limits.
        resident: Returns the process's resident memory in MB; called only if that is limited.
    """

    def __init__(
        self,
        models: Sequence[ServedModel],
        budget: MemoryBudget,
        resident: Callable[[], float] = resident_mb,
    ) -> None:
        self._models = {model.name: model for model in models}
        self._budget = budget
        self._resident = resident
        self._evicted: Callable[[], object] = lambda: None

    def open(self) -> None:
        """Load models in order while the budget allows; check that the others exist.

        Raises:
            PtDeployError: A model cannot serve.
            MlflowException: A model cannot be found or fetched.
        """
        full = ""
        for model in self._models.values():
            full = full or self._budget.excess(len(self._loaded()) + 1)
            if full:
                model.register_unloaded(full)
                continue
            model.open()
            if full := self._over_budget():
                model.unload(full)

    def reconcile(self) -> bool:
        """Load requested models, the oldest request first, and evict while over budget.

        Returns:
            Whether to call this again soon, because a model has to stay loaded for now.
        """
        waiting = False
        for model in sorted(self._models.values(), key=lambda model: model.requested_at):
            if model.requested_at and self._make_room():
                model.reload()
            waiting = waiting or bool(model.requested_at)
        return self._evict_over_budget() or waiting

    def _make_room(self) -> bool:
        """Evict until one more model fits; returns whether it does."""
        while reason := self._budget.excess(len(self._loaded()) + 1):
            if not self._evict(reason):
                return False
        return True

    def _evict_over_budget(self) -> bool:
        """Evict one model if memory is over budget; returns whether to check again soon."""
        if not self._over_budget():
            return False
        if self._evicted() is None:  # otherwise it still answers requests and holds its memory
            trim()
            if reason := self._over_budget():
                self._evict(reason)
        return True

    def _over_budget(self) -> str:
        held_mb = self._resident() if self._budget.max_memory_mb else 0.0
        return self._budget.excess(len(self._loaded()), held_mb)

    def _evict(self, reason: str) -> bool:
        name = least_recently_used(self._loaded(), time.perf_counter())
        if name is None:
            return False
        self._evicted = self._models[name].unload(reason)
        return True

    def _loaded(self) -> list[CacheEntry]:
        models = self._models.values()
        return [CacheEntry(m.name, m.used_at, m.loaded_at, m.load_s) for m in models if m.current]
