"""The one thread that opens the slots and then looks after them, so that serving never waits."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence

from mlflow_pt_deploy.serving.lifecycle.eviction import Room
from mlflow_pt_deploy.serving.lifecycle.model_cache import Keeper
from mlflow_pt_deploy.serving.lifecycle.process_memory import settle
from mlflow_pt_deploy.serving.lifecycle.served_model import Slot

# Where something waits for room, it is looked at so often; and never more often than this, or a
# registry that does not answer would be asked at every request.
_SOON_S = 0.1


class Watcher(threading.Thread):
    """Opens all slots, then looks at each of them again and again.

    A daemon: it may hang in a registry that does not answer, and must not keep the server alive.

    Args:
        slots: What to look after.
        poll_s: Seconds between looks, give or take a fifth so that many servers do not ask at
            once; 0: never look again.
        room: How much may be in memory.
        opened: Called when all slots have a version, or are found where there is no room.
        failed: Called with the error when one cannot be opened; the thread then ends.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        poll_s: float,
        *,
        room: Room | None = None,
        opened: Callable[[], None],
        failed: Callable[[Exception], None],
        looked: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(name="watcher", daemon=True)
        self._slots = slots
        self._poll_s = poll_s
        self._keeper = Keeper(slots, room or Room())
        self._opened = opened
        self._failed = failed
        self._looked = looked
        self._woken = threading.Event()
        self._stopped = threading.Event()
        for slot in slots:
            slot.wake = self._woken.set

    def run(self) -> None:
        """What the thread does."""
        try:
            self._keeper.open()
        except Exception as error:
            self._failed(error)
            return
        settle()
        self._opened()
        look_at = self._next_look()
        while not self._stopped.wait(_SOON_S):
            waiting = self._keeper.attend()
            if look_at is not None and time.monotonic() >= look_at:
                before = self._labels()
                for slot in self._slots:
                    slot.look()
                if self._labels() != before:
                    settle()
                self._looked()
                look_at = self._next_look()
            elif not waiting:
                self._woken.wait(None if look_at is None else look_at - time.monotonic())
                self._woken.clear()

    def stop(self) -> None:
        """Look no more; does not wait for a look under way."""
        self._stopped.set()
        self._woken.set()

    def _labels(self) -> list[str]:
        """What serves."""
        return [slot.current.label if slot.current else "" for slot in self._slots]

    def _next_look(self) -> float | None:
        pause_s = self._poll_s * random.uniform(0.8, 1.2)
        return time.monotonic() + pause_s if pause_s else None
