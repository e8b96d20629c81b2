"""Rows per second of a batch prediction: progress, and the size of the next chunk."""

from __future__ import annotations

import time

from mlflow_pt_deploy.data.tables.readers import TableReader
from mlflow_pt_deploy.system.progress import Progress

MIN_ROWS = 256
# A chunk takes about this long, so that a signal ends the command in time.
_CHUNK_S = 2.0


class Pace:
    """Shows progress, and sizes chunks by the speed of the last one.

    Args:
        reader: The input, before its first chunk.
        shown: Progress in the unit of the reader.
        max_rows: Most rows of a chunk.

    Attributes:
        chunk_rows: Rows that the next chunk should have.
    """

    def __init__(self, reader: TableReader, shown: Progress, max_rows: int) -> None:
        self._shown, self._max_rows, self._total = shown, max_rows, reader.total
        self._first = self._position = reader.position
        self._started = self._last = time.monotonic()
        self._rows = 0
        self.chunk_rows = MIN_ROWS

    def advance(self, rows: int, position: int) -> None:
        """Record a chunk.

        Args:
            rows: Its rows.
            position: How much of the input was read after it, in the unit of the reader.
        """
        now = time.monotonic()
        chunk_s, self._last = max(now - self._last, 1e-6), now
        self.chunk_rows = min(max(MIN_ROWS, int(rows / chunk_s * _CHUNK_S)), self._max_rows)
        read, self._position = position - self._position, position
        self._rows += rows
        seconds = now - self._started
        left = ""
        if self._first < position <= self._total:
            left_s = seconds * (self._total - position) / (position - self._first)
            left = f", {left_s:,.0f} s left"
        self._shown.update(
            read if self._total else rows, f"{self._rows / seconds:,.0f} rows/s{left}"
        )
