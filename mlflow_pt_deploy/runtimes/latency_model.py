"""What a call costs, by its rows or its tokens, learned from the calls of late.

Knows neither, only how large a call was and how long it took.
"""

from __future__ import annotations

import math

# How much of what was seen stays at each call, and how different in size calls must have been, as
# the squared coefficient of variation, to tell the call's own cost from the rest.
_KEPT = 0.95
_VARIED = 0.01


class Cost:
    """Seconds of a call: some for the call itself, and some for each of what it holds.

    A line through the calls of late by least squares, older ones forgotten exponentially. Calls of
    one size say nothing of its slope: then the last known proportion stays. Before there is any,
    all is put down to the call, so that nobody is refused on a guess.

    Attributes:
        call_s: Seconds for a call.
        each_s: Seconds for each of what it holds.
    """

    def __init__(self) -> None:
        self.call_s = self.each_s = 0.0
        self._calls = self._sizes = self._squares = self._seconds = self._products = 0.0

    def saw(self, size: int, seconds: float) -> None:
        """Take a call in."""
        self._calls = _KEPT * self._calls + 1
        self._sizes = _KEPT * self._sizes + size
        self._squares = _KEPT * self._squares + size * size
        self._seconds = _KEPT * self._seconds + seconds
        self._products = _KEPT * self._products + size * seconds
        spread = self._calls * self._squares - self._sizes**2
        if spread > _VARIED * self._sizes**2:
            slope = (self._calls * self._products - self._sizes * self._seconds) / spread
            self.each_s = min(max(slope, 0.0), self._seconds / self._sizes)
            self.call_s = (self._seconds - self.each_s * self._sizes) / self._calls
            return
        expected = self.call_s * self._calls + self.each_s * self._sizes
        if expected:
            self.call_s *= self._seconds / expected
            self.each_s *= self._seconds / expected
        else:
            self.call_s = self._seconds / self._calls

    def of(self, count: int, most: int) -> float:
        """Seconds that so many take, with at most `most` in a call."""
        return math.ceil(count / most) * self.call_s + count * self.each_s

    def within(self, seconds: float, most: int) -> float:
        """How many surely take no longer, with at most `most` in a call; infinity if unknown."""
        each_s = self.each_s + self.call_s / most
        return max(0.0, seconds - self.call_s) / each_s if each_s else math.inf
