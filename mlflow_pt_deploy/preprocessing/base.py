"""What a preprocessor of any kind owes its callers, and how a raw row travels as JSON."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy.typing as npt

Row = str | bytes
"""One raw input: a text, or an encoded image (PNG, JPEG, ...)."""


class Axis(NamedTuple):
    """An axis of an input whose size is free: its name, and the least and the most."""

    name: str
    least: int
    most: int


BATCH = Axis("batch", 1, 65536)


class Preprocessor(Protocol):
    """Raw rows to named arrays.

    Attributes:
        column: What a table calls the rows: ``text`` or ``image``.
        files: Names of the files that `save` writes.
        slice_rows: How many encoded rows to hold in memory at once.
    """

    column: str
    files: tuple[str, ...]
    slice_rows: int

    @property
    def axes(self) -> Mapping[str, Mapping[int, Axis]]:
        """The free axes of each input, in the order of the model's arguments."""

    def save(self, folder: Path) -> None:
        """Write `files` into an existing folder."""

    def encode(self, rows: Sequence[Any]) -> Sequence[Any]:
        """Each row read for itself.

        Raises:
            RowError: A row cannot be read.
        """

    def collate(self, encoded: Sequence[Any]) -> dict[str, npt.NDArray[Any]]:
        """Encoded rows as one batch: named arrays, batch first, in the order of `axes`."""

    def samples(self) -> Sequence[Any]:
        """Encoded rows of a few sizes, for a model to warm up with."""

    def tokens(self, encoded: Any) -> int:
        """What one encoded row costs a model, in tokens."""

    def __call__(self, rows: Sequence[Any]) -> dict[str, npt.NDArray[Any]]:
        """`encode` and `collate` in one step."""


def row_to_json(row: Row) -> str | dict[str, str]:
    """A raw row as a JSON value: a text as it is, bytes as ``{"base64": "..."}``."""
    return row if isinstance(row, str) else {"base64": base64.b64encode(row).decode()}


def row_from_json(value: str | Mapping[str, str]) -> Row:
    """What `row_to_json` was given."""
    return value if isinstance(value, str) else base64.b64decode(value["base64"])
