"""Online linear latency model of calls: seconds = overhead + per_item * size."""

from __future__ import annotations

import math

_DECAY = 0.95  # weight of older calls after each new one
_MIN_VARIATION = 0.01  # squared coefficient of variation of sizes needed to fit a slope


class LatencyModel:
    """Least squares fit over recent calls with exponential decay.

    If all calls have the same size, the last known ratio of overhead to per-item time is kept.
    Before the first fit all time counts as overhead, so that no request is rejected on a guess.

    Attributes:
        overhead_s: Constant seconds per call.
        per_item_s: Seconds per row or token.
    """

    def __init__(self) -> None:
        self.overhead_s = self.per_item_s = 0.0
        self._calls = self._sizes = self._squares = self._seconds = self._products = 0.0

    def observe(self, size: int, seconds: float) -> None:
        """Add a call of `size` items that took `seconds`."""
        self._calls = _DECAY * self._calls + 1
        self._sizes = _DECAY * self._sizes + size
        self._squares = _DECAY * self._squares + size * size
        self._seconds = _DECAY * self._seconds + seconds
        self._products = _DECAY * self._products + size * seconds
        spread = self._calls * self._squares - self._sizes**2
        if spread > _MIN_VARIATION * self._sizes**2:
            slope = (self._calls * self._products - self._sizes * self._seconds) / spread
            self.per_item_s = min(max(slope, 0.0), self._seconds / self._sizes)
            self.overhead_s = (self._seconds - self.per_item_s * self._sizes) / self._calls
            return
        expected = self.overhead_s * self._calls + self.per_item_s * self._sizes
        if expected:
            self.overhead_s *= self._seconds / expected
            self.per_item_s *= self._seconds / expected
        else:
            self.overhead_s = self._seconds / self._calls

    def predict_s(self, size: int, max_size: int) -> float:
        """Estimate the seconds for `size` items in calls of at most `max_size` items."""
        return math.ceil(size / max_size) * self.overhead_s + size * self.per_item_s
