"""LRU cache of the predictions of one loaded version, by exact row.

Each version in memory has its own, so a swap starts with an empty one. All methods run on the event
loop, except `holds`.
"""

from __future__ import annotations

import sys
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from mlflow_pt_deploy.preprocessing import Row

_ENTRY_BYTES = 480
"""An entry without its row, JSON and tokens: its objects, and its place in the table."""
_LARGEST_SHARE = 8
"""A row that takes more than the limit divided by this is not kept."""

_Key = Row | tuple[Row, int]


class CachedPrediction(NamedTuple):
    """The prediction for a row.

    Attributes:
        text: As JSON.
        best: Best class and its score.
        tokens: Token ids of a text; empty for an image.
    """

    text: str
    best: tuple[int, float]
    tokens: array[int]


class PredictionCache:
    """Predictions by row and number of labels.

    Args:
        max_mb: Most memory in MB (10^6 bytes), as estimated by `bytes`.

    Attributes:
        hits: Rows that were found.
        misses: Rows that were not.
        bytes: Estimated memory of all entries.
        on_lookup: Called with the hits and misses of each request.
    """

    def __init__(self, max_mb: float) -> None:
        self.hits = self.misses = self.bytes = 0
        self.on_lookup: Callable[[int, int], None] = lambda hits, misses: None
        self._max_bytes = round(max_mb * 1e6)
        self._entries: OrderedDict[_Key, CachedPrediction] = OrderedDict()

    def lookup(self, rows: Sequence[Row], top_k: int) -> list[CachedPrediction | None]:
        """The predictions for rows; None for those that are not there."""
        entries = self._entries
        found: list[CachedPrediction | None] = []
        hits = 0
        for row in rows:
            key = row if top_k == 1 else (row, top_k)
            entry = entries.get(key)
            if entry is not None:
                entries.move_to_end(key)
                hits += 1
            found.append(entry)
        misses = len(found) - hits
        self.hits += hits
        self.misses += misses
        self.on_lookup(hits, misses)
        return found

    def holds(self, row: Row, top_k: int) -> bool:
        """Whether a row is there now; callable from any thread."""
        return (row if top_k == 1 else (row, top_k)) in self._entries

    def add(self, row: Row, top_k: int, entry: CachedPrediction) -> None:
        """Keep a prediction; the least recently used ones make room for it."""
        key = row if top_k == 1 else (row, top_k)
        size = _size(row, entry)
        if key in self._entries or size > self._max_bytes // _LARGEST_SHARE:
            return
        self._entries[key] = entry
        self.bytes += size
        while self.bytes > self._max_bytes:
            oldest, removed = self._entries.popitem(last=False)
            self.bytes -= _size(oldest[0] if isinstance(oldest, tuple) else oldest, removed)

    def status(self) -> dict[str, Any]:
        """Its entry in ``/model``."""
        asked = self.hits + self.misses
        return {
            "rows": len(self._entries),
            "mb": round(self.bytes / 1e6, 3),
            "max_mb": self._max_bytes / 1e6,
            "hits": self.hits,
            "misses": self.misses,
            "hit_rate": round(self.hits / asked, 4) if asked else None,
        }


def _size(row: Row, entry: CachedPrediction) -> int:
    return (
        _ENTRY_BYTES
        + sys.getsizeof(row)
        + sys.getsizeof(entry.text)
        + len(entry.tokens) * entry.tokens.itemsize
    )
