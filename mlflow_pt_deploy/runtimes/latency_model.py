"""A linear latency model of calls, fitted online: seconds = overhead + per_item x size."""

from __future__ import annotations

import math

# Weight that is left of older calls after each new one, and the least squared coefficient of
# variation of sizes from which a slope can be told.
_DECAY = 0.95
_MIN_VARIATION = 0.01


class LatencyModel:
    """Least squares over recent calls, older ones forgotten exponentially.

    Calls of one size say nothing about the slope: the last known proportion is kept. Before there
    is any, everything counts as overhead, so that no request is rejected on a guess.

    Attributes:
        overhead_s: Seconds of a call, whatever its size.
        per_item_s: Seconds of each row or token.
    """

    def __init__(self) -> None:
        self.overhead_s = self.per_item_s = 0.0
        self._calls = self._sizes = self._squares = self._seconds = self._products = 0.0

    def observe(self, size: int, seconds: float) -> None:
        """Add a call."""
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
        """Estimated seconds for `size` items, at most `max_size` a call."""
        return math.ceil(size / max_size) * self.overhead_s + size * self.per_item_s
