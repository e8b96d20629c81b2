"""Loads the models, then polls the registry for new versions of each, on its own threads."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from mlflow_pt_deploy.serving.lifecycle.eviction import MemoryBudget
from mlflow_pt_deploy.serving.lifecycle.model_cache import ModelCache
from mlflow_pt_deploy.serving.lifecycle.served_model import ServedModel
from mlflow_pt_deploy.system.device import release_cached_memory
from mlflow_pt_deploy.system.process_memory import freeze_gc

# Seconds between checks while a model waits for memory, and for a webhook.
_RECHECK_S = 0.1
MIN_POLL_S = 1.0
"""Least seconds between two polls that webhooks ask for."""


class RegistryWatcher(threading.Thread):
    """Opens all models, then polls each of them on its own thread.

    A daemon thread: a registry that does not answer must not keep the process alive.

    Args:
        models: All models of the server.
        poll_s: Seconds between polls, varied by 20 % so that many servers do not poll together; 0:
            never.
        budget: Limits of models in memory.
        on_opened: Called when all models are loaded, or left unloaded within the budget.
        on_failed: Called with the error if a model cannot be opened; the thread then ends.
        on_polled: Called after each poll of a model.
        changed_at: When a webhook last said that the registry has changed; a new value lets all
            models be polled now. None: there is no webhook.
        beside: Called with each model after it was loaded or polled, one call at a time for each
            model. Its thread is another one: a long call does not delay the next poll.
    """

    def __init__(
        self,
        models: Sequence[ServedModel],
        poll_s: float,
        *,
        budget: MemoryBudget | None = None,
        on_opened: Callable[[], None],
        on_failed: Callable[[Exception], None],
        on_polled: Callable[[], None] = lambda: None,
        changed_at: Callable[[], int] | None = None,
        beside: Callable[[ServedModel], None] | None = None,
    ) -> None:
        super().__init__(name="registry-watcher", daemon=True)
        self._models = models
        self._poll_s = poll_s
        self._cache = ModelCache(models, budget or MemoryBudget())
        self._on_opened = on_opened
        self._on_failed = on_failed
        self._on_polled = on_polled
        self._changed_at = changed_at
        self._seen_change = changed_at() if changed_at else 0
        self._polled_at = 0.0
        self._beside = beside
        self._woken = threading.Event()
        self._stopped = threading.Event()
        self._polls = ThreadPoolExecutor(2 * len(models), thread_name_prefix="poll")
        self._running: dict[str, Future[None]] = {}
        for model in models:
            model.wake = self._woken.set

    def run(self) -> None:
        """Load the models, then poll until `stop`."""
        try:
            self._cache.open()
        except Exception as error:
            self._on_failed(error)
            return
        freeze_gc()
        self._on_opened()
        for model in self._models:
            self._start(f"beside {model.name}", self._act_beside, model)
        next_poll = self._next_poll()
        while not self._stopped.wait(_RECHECK_S):
            waiting = self._cache.reconcile()
            change = self._changed_at() if self._changed_at else 0
            if next_poll is not None and change != self._seen_change:
                next_poll = min(next_poll, self._polled_at + MIN_POLL_S)
            if next_poll is not None and time.monotonic() >= next_poll:
                self._polled_at = time.monotonic()
                started = [self._start(model.name, self._poll, model) for model in self._models]
                if all(started):
                    self._seen_change = change
                next_poll = self._next_poll()
            elif not waiting:
                self._woken.wait(self._pause_s(next_poll))
                self._woken.clear()

    def stop(self) -> None:
        """Stop polling; does not wait for a running poll."""
        self._stopped.set()
        self._woken.set()
        self._polls.shutdown(wait=False, cancel_futures=True)

    def _pause_s(self, next_poll: float | None) -> float | None:
        """Seconds to the next poll, or to the next look for a webhook; None: there is none."""
        if next_poll is None:
            return None
        pause_s = next_poll - time.monotonic()
        return min(pause_s, _RECHECK_S) if self._changed_at else pause_s

    def _start(self, key: str, call: Callable[[ServedModel], None], model: ServedModel) -> bool:
        """Call on a thread; False while the last call of this key is still running."""
        running = self._running.get(key)
        idle = running is None or running.done()
        if idle and not self._stopped.is_set():
            self._running[key] = self._polls.submit(call, model)
        return idle

    def _poll(self, model: ServedModel) -> None:
        before = model.current
        model.poll()
        if model.current is not before:
            del before
            freeze_gc()
            release_cached_memory()
        self._on_polled()
        self._start(f"beside {model.name}", self._act_beside, model)

    def _act_beside(self, model: ServedModel) -> None:
        model.keep_copy()
        if self._beside is not None:
            self._beside(model)
            self._on_polled()

    def _next_poll(self) -> float | None:
        pause_s = self._poll_s * random.uniform(0.8, 1.2)
        return time.monotonic() + pause_s if pause_s else None
