"""Who computes for a batcher: its callers, and threads of its own, so many at a time.

Knows neither rows nor the model.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

Work = Callable[[], None]


class Workers:
    """Counts those who compute, and lends threads.

    Not safe for threads by itself, but for `lend`: the batcher holds its lock.

    Attributes:
        streams: How many may compute at a time.
    """

    def __init__(self) -> None:
        self.streams = 1
        self._number = 0
        self._threads: ThreadPoolExecutor | None = None

    @property
    def busy(self) -> bool:
        """Whether somebody computes."""
        return self._number > 0

    @property
    def full(self) -> bool:
        """Whether there are several streams, and each computes: the next ends soon."""
        return 1 < self.streams <= self._number

    @property
    def alone(self) -> bool:
        """Whether one computes, and no other."""
        return self._number == 1

    def spread(self, streams: int) -> None:
        """From here on so many may compute at a time."""
        self.streams, self._threads = streams, None

    def take_on(self) -> bool:
        """Whether another may compute; counts him as doing so."""
        free = self._number < self.streams
        self._number += free
        return free

    def dismiss(self) -> None:
        """One computes no more."""
        self._number -= 1

    def lend(self, work: Work) -> bool:
        """Let a thread compute in the place of one who is counted.

        Args:
            work: Ends with `dismiss`, or has another one lent.

        Returns:
            Whether there is one: the system may refuse it, as where a container has a limit.
        """
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self.streams, thread_name_prefix="batcher")
        call = [work]
        try:
            self._threads.submit(_do, call)
        except RuntimeError:
            return _take(call) is None  # the pool keeps the call, which a thread may have taken
        return True


def _do(call: list[Work]) -> None:
    if work := _take(call):
        work()


def _take(call: list[Work]) -> Work | None:
    """Once."""
    with suppress(IndexError):
        return call.pop()
    return None
