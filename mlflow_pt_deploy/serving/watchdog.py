"""A thread that ends this worker if it hangs, or if the main process is gone.

granian starts another worker, which serves what was served last.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow_pt_deploy.serving.lifecycle.served_model import ServedModel

TICK_S = 1.0
HANG_STATUS = 70

_logger = logging.getLogger(__name__)


class Watchdog(threading.Thread):
    """Checks once a second.

    Args:
        models: Whose running batches are watched.
        hang_s: Seconds for one batch, or without progress of the event loop; 0: never end.
        grace_s: Seconds to finish requests once the main process is gone.
        tick: Called at each check.
    """

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        hang_s: float,
        grace_s: float,
        tick: Callable[[], None],
    ) -> None:
        super().__init__(name="watchdog", daemon=True)
        self._models = models
        self._hang_s = hang_s
        self._grace_s = grace_s
        self._tick = tick
        self._parent = os.getppid()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._missed_s = 0.0
        self._answered = threading.Event()
        self._stopped = threading.Event()

    def watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start watching an event loop."""
        self._loop = loop
        self.start()

    def stop(self) -> None:
        """Check no more."""
        self._stopped.set()

    def run(self) -> None:
        """What the thread does."""
        while not self._stopped.wait(TICK_S):
            self._tick()
            if os.getppid() != self._parent:
                self._leave()
                return
            if self._hang_s and (reason := self._hang()):
                _logger.error("worker ends: %s for %g s", reason, self._hang_s)
                os._exit(HANG_STATUS)

    def _hang(self) -> str:
        """What hangs; empty if nothing does."""
        for model in self._models.values():
            version = model.current
            if version and version.pyfunc.service.batcher.executor.running_s > self._hang_s:
                return f"model {model.name} has been computing one batch"
        # ticks are counted instead of time: if the whole machine slept, nothing hangs
        if self._loop is not None:
            self._missed_s = 0.0 if self._answered.is_set() else self._missed_s + TICK_S
            self._answered.clear()
            self._loop.call_soon_threadsafe(self._answered.set)
            if self._missed_s > self._hang_s:
                return "the event loop has made no progress"
        return ""

    def _leave(self) -> None:
        """The main process was killed: finish requests, then end."""
        _logger.error("the main process is gone; worker ends")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(self._grace_s)
        os._exit(1)
