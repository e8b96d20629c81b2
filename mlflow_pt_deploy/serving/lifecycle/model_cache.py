"""Which models are in memory: loads what is asked for, and unloads what there is no room for.

`room` decides, this acts; all of it in the watcher's thread. A swap needs room for both versions
while it lasts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from mlflow_pt_deploy.serving.lifecycle.eviction import Loaded, Room, longest_unused
from mlflow_pt_deploy.serving.lifecycle.process_memory import resident_mb, trim
from mlflow_pt_deploy.serving.lifecycle.served_model import Slot


class Keeper:
    """Keeps slots within their room.

    Args:
        slots: All of the server's, the most important first.
        room: The limits.
        resident: Tells the process's resident memory in MB; asked only where that has a limit.
    """

    def __init__(
        self, slots: Sequence[Slot], room: Room, resident: Callable[[], float] = resident_mb
    ) -> None:
        self._slots = {slot.name: slot for slot in slots}
        self._room = room
        self._resident = resident
        self._going: Callable[[], object] = lambda: None

    def open(self) -> None:
        """Load models from the first on while there is room; the others must at least be there.

        Raises:
            PtDeployError: One may not serve.
            MlflowException: One cannot be found or fetched.
        """
        full = ""
        for slot in self._slots.values():
            full = full or self._room.excess(len(self._loaded()) + 1)
            if full:
                slot.defer(full)
                continue
            slot.open()
            if full := self._too_much():
                slot.unload(full)

    def attend(self) -> bool:
        """Load what was asked for, oldest wish first, and unload what is too much.

        Returns:
            Whether something is left to do for which it is too early.
        """
        waiting = False
        for slot in sorted(self._slots.values(), key=lambda slot: slot.asked):
            if slot.asked and self._make_room():
                slot.reload()
            waiting = waiting or bool(slot.asked)
        return self._shrink() or waiting

    def _make_room(self) -> bool:
        """Unload until one more model fits in; whether it does."""
        while reason := self._room.excess(len(self._loaded()) + 1):
            if not self._unload(reason):
                return False
        return True

    def _shrink(self) -> bool:
        """Unload one model if memory is above its limit; whether to look again soon."""
        if not self._too_much():
            return False
        if self._going() is None:  # else it still answers, and its memory is not free yet
            trim()
            if reason := self._too_much():
                self._unload(reason)
        return True

    def _too_much(self) -> str:
        held_mb = self._resident() if self._room.max_memory_mb else 0.0
        return self._room.excess(len(self._loaded()), held_mb)

    def _unload(self, reason: str) -> bool:
        name = longest_unused(self._loaded(), time.perf_counter())
        if name is None:
            return False
        self._going = self._slots[name].unload(reason)
        return True

    def _loaded(self) -> list[Loaded]:
        slots = self._slots.values()
        return [Loaded(s.name, s.used, s.loaded, s.took_s) for s in slots if s.current]
