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
from mlflow_pt_deploy.system.process_memory import freeze_gc

# Seconds between checks while a model waits for memory.
_RECHECK_S = 0.1


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
        beside: Callable[[ServedModel], None] | None = None,
    ) -> None:
        super().__init__(name="registry-watcher", daemon=True)
        self._models = models
        self._poll_s = poll_s
        self._cache = ModelCache(models, budget or MemoryBudget())
        self._on_opened = on_opened
        self._on_failed = on_failed
        self._on_polled = on_polled
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
            if next_poll is not None and time.monotonic() >= next_poll:
                for model in self._models:
                    self._start(model.name, self._poll, model)
                next_poll = self._next_poll()
            elif not waiting:
                self._woken.wait(None if next_poll is None else next_poll - time.monotonic())
                self._woken.clear()

    def stop(self) -> None:
        """Stop polling; does not wait for a running poll."""
        self._stopped.set()
        self._woken.set()
        self._polls.shutdown(wait=False, cancel_futures=True)

    def _start(self, key: str, call: Callable[[ServedModel], None], model: ServedModel) -> None:
        """Call on a thread, unless the last call of this key is still running."""
        running = self._running.get(key)
        if (running is None or running.done()) and not self._stopped.is_set():
            self._running[key] = self._polls.submit(call, model)

    def _poll(self, model: ServedModel) -> None:
        before = model.current
        model.poll()
        if model.current is not before:
            freeze_gc()
        self._on_polled()
        self._start(f"beside {model.name}", self._act_beside, model)

    def _act_beside(self, model: ServedModel) -> None:
        if self._beside is not None:
            self._beside(model)
            self._on_polled()

    def _next_poll(self) -> float | None:
        pause_s = self._poll_s * random.uniform(0.8, 1.2)
        return time.monotonic() + pause_s if pause_s else None
