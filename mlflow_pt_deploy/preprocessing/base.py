"""Interface of preprocessors, and the JSON encoding of raw rows."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy.typing as npt

Row = str | bytes
"""One raw input: a text, or an encoded image (PNG, JPEG, ...)."""


class Axis(NamedTuple):
    """A dynamic axis of an input, with its name, minimum size and maximum size."""

    name: str
    minimum: int
    maximum: int


BATCH = Axis("batch", 1, 65536)


class Preprocessor(Protocol):
    """Converts raw rows to named arrays.

    Attributes:
        column: Name of the input column, ``text`` or ``image``.
        files: Names of the files that `save` writes.
        slice_rows: Maximum number of encoded rows to keep in memory at once.
        unknown_id: Token id of what the vocabulary lacks; None if there is none.
    """

    column: str
    files: tuple[str, ...]
    slice_rows: int
    unknown_id: int | None

    @property
    def axes(self) -> Mapping[str, Mapping[int, Axis]]:
        """Dynamic axes of each input, in the order of the model's arguments."""

    def save(self, folder: Path) -> None:
        """Write `files` to an existing folder."""

    def encode(self, rows: Sequence[Any]) -> Sequence[Any]:
        """Encode each row separately.

        Raises:
            RowError: A row cannot be read.
        """

    def collate(self, encoded: Sequence[Any]) -> dict[str, npt.NDArray[Any]]:
        """Combine encoded rows into a batch of named arrays, batch axis first, in `axes` order."""

    def join(
        self, batches: Sequence[Mapping[str, npt.NDArray[Any]]]
    ) -> dict[str, npt.NDArray[Any]]:
        """Combine results of `collate` into one batch, as if their rows were collated together."""

    def warmup_rows(self) -> Sequence[Any]:
        """Encoded rows of several sizes, to warm up a model."""

    def token_count(self, encoded: Any) -> int:
        """Number of tokens of an encoded row, as a measure of its cost."""

    def __call__(self, rows: Sequence[Any]) -> dict[str, npt.NDArray[Any]]:
        """`encode` and `collate` in one step."""


def row_to_json(row: Row) -> str | dict[str, str]:
    """Encode a raw row as JSON: a text unchanged, bytes as ``{"base64": "..."}``."""
    return row if isinstance(row, str) else {"base64": base64.b64encode(row).decode()}


def row_from_json(value: str | Mapping[str, str]) -> Row:
    """Decode the result of `row_to_json`."""
    return value if isinstance(value, str) else base64.b64decode(value["base64"])
