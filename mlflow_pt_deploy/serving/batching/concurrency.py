"""Limits concurrent batches and owns the threads they run on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

Work = Callable[[], None]


class ConcurrencyLimiter:
    """Counts running batches and owns the worker threads.

    Not thread-safe except for `run_in_thread`: the batcher holds its lock.

    Attributes:
        streams: Most batches at a time.
    """

    def __init__(self) -> None:
        self.streams = 1
        self._running = 0
        self._threads: ThreadPoolExecutor | None = None

    @property
    def busy(self) -> bool:
        """Whether a batch is running."""
        return self._running > 0

    @property
    def saturated(self) -> bool:
        """Whether there are several streams and all are running."""
        return 1 < self.streams <= self._running

    @property
    def is_sole(self) -> bool:
        """Whether exactly one batch is running."""
        return self._running == 1

    def set_streams(self, streams: int) -> None:
        """Allow this many batches at a time from now on."""
        self.streams, self._threads = streams, None

    def try_acquire(self) -> bool:
        """Take a stream if one is free."""
        free = self._running < self.streams
        self._running += free
        return free

    def release(self) -> None:
        """Give a stream back."""
        self._running -= 1

    def run_in_thread(self, work: Work) -> bool:
        """Run `work` on a worker thread, on a stream that the caller acquired.

        Args:
            work: Releases the stream at its end, or passes it on.

        Returns:
            False if no thread can be started, e.g. because of a container's limit.
        """
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self.streams, thread_name_prefix="batcher")
        call = [work]
        try:
            self._threads.submit(_run_once, call)
        except RuntimeError:
            # the pool keeps the call although it started no thread; an older thread may run it
            return _pop(call) is None
        return True


def _run_once(call: list[Work]) -> None:
    if work := _pop(call):
        work()


def _pop(call: list[Work]) -> Work | None:
    with suppress(IndexError):
        return call.pop()
    return None
