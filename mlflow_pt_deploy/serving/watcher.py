"""The one thread that opens the slots and then looks after them, so that serving never waits."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence

from mlflow_pt_deploy.serving.slot import Slot


class Watcher(threading.Thread):
    """Opens all slots, then looks at each of them again and again.

    A daemon: it may hang in a registry that does not answer, and must not keep the server alive.

    Args:
        slots: What to look after.
        poll_s: Seconds between looks, give or take a fifth so that many servers do not ask at
            once; 0: never look again.
        opened: Called when all slots have a version.
        failed: Called with the error when one cannot be opened; the thread then ends.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        poll_s: float,
        *,
        opened: Callable[[], None],
        failed: Callable[[Exception], None],
    ) -> None:
        super().__init__(name="watcher", daemon=True)
        self._slots = slots
        self._poll_s = poll_s
        self._opened = opened
        self._failed = failed
        self._stop_asked = threading.Event()

    def run(self) -> None:
        """What the thread does."""
        try:
            for slot in self._slots:
                slot.open()
        except Exception as error:
            self._failed(error)
            return
        self._opened()
        while self._poll_s and not self._stop_asked.wait(self._poll_s * random.uniform(0.8, 1.2)):
            for slot in self._slots:
                slot.look()

    def stop(self) -> None:
        """Look no more; does not wait for a look under way."""
        self._stop_asked.set()
