"""A thread that ends this worker if it hangs, and that bounds its shutdown.

granian starts another worker, which serves what was served last.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow_pt_deploy.serving.app import Application
    from mlflow_pt_deploy.serving.lifecycle.served_model import ServedModel
    from mlflow_pt_deploy.serving.worker_state import WorkerStates

_EXIT_S = 5.0
TICK_S = 1.0
HANG_STATUS = 70
# Responses that were handed to granian are written within this time.
_QUIET_S = 1.0
_SHUTDOWN_TICK_S = 0.1

_logger = logging.getLogger(__name__)


class Watchdog(threading.Thread):
    """Checks once a second.

    Args:
        models: Models whose running batches are watched.
        states: Says whether the server is shutting down.
        parent: Process id of the main process.
        hang_s: Most seconds for one batch, or without progress of the event loop; 0: no limit.
        grace_s: Most seconds that a shutdown may take.
        tick: Called at each check.
    """

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        states: WorkerStates,
        parent: int,
        hang_s: float,
        grace_s: float,
        tick: Callable[[], None],
    ) -> None:
        super().__init__(name="watchdog", daemon=True)
        self._models = models
        self._states = states
        self._parent = parent
        self._hang_s = hang_s
        self._grace_s = grace_s
        self._tick = tick
        self._application: Application
        self._loop: asyncio.AbstractEventLoop
        self._missed_s = 0.0
        self._answered = threading.Event()
        self._stopped = threading.Event()

    def watch(self, application: Application, loop: asyncio.AbstractEventLoop) -> None:
        """Start watching an application and the event loop that it runs on."""
        self._application, self._loop = application, loop
        self.start()

    def stop(self) -> None:
        """Stop checking; the event loop has ended."""
        self._stopped.set()

    def run(self) -> None:
        """Check until the worker ends."""
        while not self._stopped.wait(TICK_S):
            self._tick()
            if os.getppid() != self._parent:
                _logger.error("the main process is gone; worker ends")
                self._shut_down()
            elif self._states.stopping:
                self._shut_down()
            elif self._hang_s and (reason := self._hang()):
                _logger.error("worker ends: %s for %g s", reason, self._hang_s)
                os._exit(HANG_STATUS)
        time.sleep(_EXIT_S)  # a daemon thread is gone by then, unless the exit hangs
        os._exit(0)

    def _hang(self) -> str:
        """What hangs; empty if nothing does."""
        for model in self._models.values():
            if model.running_s > self._hang_s:
                return f"model {model.name} has been computing one batch"
        # ticks are counted instead of time: if the whole machine slept, nothing hangs
        self._missed_s = 0.0 if self._answered.is_set() else self._missed_s + TICK_S
        self._answered.clear()
        self._loop.call_soon_threadsafe(self._answered.set)
        if self._missed_s > self._hang_s:
            return "the event loop has made no progress"
        return ""

    def _shut_down(self) -> None:
        """End the process once no request is being answered, after `grace_s` in any case.

        granian itself also waits for connections that have sent a part of a request's head.
        """
        end = time.monotonic() + self._grace_s
        quiet_since = time.monotonic()
        while (now := time.monotonic()) < end:
            if self._application.active:
                quiet_since = now
            if now - quiet_since > _QUIET_S and not self._stopped.is_set():
                self._application.stop()
                os._exit(0)
            time.sleep(_SHUTDOWN_TICK_S)
        os._exit(1)
