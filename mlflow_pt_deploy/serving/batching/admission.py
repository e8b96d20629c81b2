"""Admission control: rejects requests that would miss their deadline, before they cost anything.

The only place that rejects requests because of load. It is called when the headers of a request
are read, before its body is parsed, and again when its rows enter the queue.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from mlflow_pt_deploy.model_config import Limits

QUEUE_SHARE = 1 / 3
"""Share of the remaining time that a request may wait in the queue. The batch that is running and
its own batch take about as long again."""
STREAM_QUEUE_SHARE = 1 / 4
"""The same for concurrent batches of similar lengths: a request of a rare length waits longer than
most."""
LOOP_SHARE = 0.15
"""Share of the remaining time that requests ahead of it may take on the event loop."""

_SAMPLES, _MIN_SAMPLES, _RANK = 5, 3, 1
_MIN_REQUESTS = 16
# Reading the headers before and sending the responses after take about as long again.
_WHOLE = 2.0


class LoopIterationEstimator:
    """Estimates what a request costs on the event loop, in seconds.

    The estimate is the second-lowest of the last five samples (iteration time / requests), so that
    one pause of the machine does not raise it. Iterations with few requests are not sampled: they
    mostly measure waiting.
    """

    def __init__(self) -> None:
        self._samples: deque[float] = deque(maxlen=_SAMPLES)
        self._began = 0.0
        self.request_s = 0.0

    def begin_iteration(self) -> None:
        """Record that the first request of an iteration was parsed."""
        self._began = time.perf_counter()

    def end_iteration(self, requests: int) -> None:
        """Record that this many requests were computed or queued since `begin_iteration`."""
        if requests >= _MIN_REQUESTS:
            seconds = time.perf_counter() - self._began
            self._samples.append(_WHOLE * seconds / requests)
            if len(self._samples) >= _MIN_SAMPLES:
                self.request_s = sorted(self._samples)[_RANK]


class AdmissionController:
    """Decides whether a request may enter.

    Args:
        limits: Length of the queue, default deadline.
        queued_rows: Rows in the queue now.
        queue_wait_s: Estimated seconds until a row that enters now is computed.

    Attributes:
        queue_share: `QUEUE_SHARE` or `STREAM_QUEUE_SHARE`.
    """

    def __init__(
        self, limits: Limits, queued_rows: Callable[[], int], queue_wait_s: Callable[[], float]
    ) -> None:
        self._limits = limits
        self._queued_rows = queued_rows
        self._queue_wait_s = queue_wait_s
        self.queue_share = QUEUE_SHARE

    def release(self) -> None:
        """Ask the batcher no more; it gets no new requests."""
        self._queued_rows, self._queue_wait_s = int, float  # zeros

    def rejection(
        self, remaining_s: float | None, *, rows: int = 0, loop_wait_s: float = 0.0
    ) -> str:
        """Reason to reject a request; empty if it is admitted.

        Args:
            remaining_s: Seconds until its deadline; None: no deadline.
            rows: Rows that are about to enter the queue; 0 before they are known.
            loop_wait_s: Estimated seconds that requests ahead of it take on the event loop.
        """
        queued = self._queued_rows()
        if rows and queued + rows > self._limits.queue_rows:
            return (
                f"server overloaded: the queue holds {queued} rows and {rows} more do not fit "
                f"(queue_rows is {self._limits.queue_rows}); retry later"
            )
        if remaining_s is None or not (queued or loop_wait_s):
            return ""
        wait_s = self._queue_wait_s() + loop_wait_s
        if loop_wait_s > LOOP_SHARE * remaining_s or wait_s > self.queue_share * remaining_s:
            return (
                f"server overloaded: estimated wait {1000 * wait_s:.0f} ms is too long for the "
                f"request deadline of {1000 * remaining_s:.0f} ms; retry later"
            )
        return ""
