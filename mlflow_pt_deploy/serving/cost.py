"""What a call of the model costs, learned from the calls of late.

Knows neither rows nor models, only how many rows a call had and how long it took.
"""

from __future__ import annotations

import math

# How much of what was seen stays at each call, and how different in size calls must have been, as
# the squared coefficient of variation, to tell the call's own cost from its rows'.
_KEPT = 0.95
_VARIED = 0.01


class Cost:
    """Seconds of a call: some for the call itself, and some for each of its rows.

    A line through the calls of late by least squares, older ones forgotten exponentially. Calls of
    one size say nothing of its slope: then the last known proportion stays. Before there is any, a
    row is taken to cost nothing beside others, so that nobody is refused on a guess.
    """

    def __init__(self) -> None:
        self.call_s = self.row_s = 0.0
        self._calls = self._rows = self._rows_squared = self._seconds = self._products = 0.0

    def saw(self, rows: int, seconds: float) -> None:
        """Take a call in."""
        self._calls = _KEPT * self._calls + 1
        self._rows = _KEPT * self._rows + rows
        self._rows_squared = _KEPT * self._rows_squared + rows * rows
        self._seconds = _KEPT * self._seconds + seconds
        self._products = _KEPT * self._products + rows * seconds
        spread = self._calls * self._rows_squared - self._rows**2
        if spread > _VARIED * self._rows**2:
            slope = (self._calls * self._products - self._rows * self._seconds) / spread
            self.row_s = min(max(slope, 0.0), self._seconds / self._rows)
            self.call_s = (self._seconds - self.row_s * self._rows) / self._calls
            return
        expected = self.call_s * self._calls + self.row_s * self._rows
        if expected:
            self.call_s *= self._seconds / expected
            self.row_s *= self._seconds / expected
        else:
            self.call_s = self._seconds / self._calls

    def of(self, rows: int, most: int) -> float:
        """Seconds that so many rows take, with at most `most` in a call."""
        return math.ceil(rows / most) * self.call_s + rows * self.row_s
