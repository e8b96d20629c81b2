"""Scores chunks of a table, and isolates the rows that cannot be scored."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mlflow_pt_deploy.data.tables.cells import read_cell
from mlflow_pt_deploy.data.tables.chunk import Chunk
from mlflow_pt_deploy.data.validation import Row
from mlflow_pt_deploy.errors import DataError, RowError
from mlflow_pt_deploy.serving.model.inference_service import InferenceService

_T = TypeVar("_T")


@dataclass(frozen=True)
class EncodedChunk:
    """A chunk that is ready for the model.

    Attributes:
        chunk: The rows that were read.
        indices: Indices of the rows that can be scored, in order.
        rows: Their texts, or bytes of their images.
        encoded: The same, encoded.
        faults: Why the other rows cannot be scored, by index.
    """

    chunk: Chunk
    indices: list[int]
    rows: list[Row]
    encoded: list[Any]
    faults: dict[int, str]


@dataclass(frozen=True)
class ScoredChunk:
    """Predictions of a chunk; `faults` includes rows at which the model failed."""

    chunk: Chunk
    indices: list[int]
    predictions: list[Any]
    faults: dict[int, str]


class BulkScorer:
    """Scores chunks with all cores, rows of similar length together.

    Args:
        service: The model.
        column: Column of the texts or images.
        folder: Base folder of relative paths of images.
        top_k: Labels of each row.
    """

    def __init__(self, service: InferenceService, column: str, folder: Path, top_k: int) -> None:
        self._service, self._column, self._folder, self._top_k = service, column, folder, top_k
        self._preprocessor = service.loaded.preprocessor

    def encode(self, chunk: Chunk, faults: dict[int, str]) -> EncodedChunk:
        """Read and encode the rows of a chunk.

        Args:
            chunk: The rows that were read.
            faults: Rows that are known to be unusable, by index.
        """
        values = chunk.values(self._column)
        faults = {**chunk.faults, **faults}
        indices, rows = [], []
        for index, value in enumerate(values):
            if index in faults:
                continue
            try:
                rows.append(read_cell(value, self._preprocessor.column, self._folder))
                indices.append(index)
            except DataError as error:
                faults[index] = f"`{self._column}` {error}"
        try:
            encoded = list(self._preprocessor.encode(rows))
        except RowError:
            return self._encode_each(chunk, indices, rows, faults)
        return EncodedChunk(chunk, indices, rows, encoded, faults)

    def _encode_each(
        self, chunk: Chunk, indices: Sequence[int], rows: Sequence[Row], faults: dict[int, str]
    ) -> EncodedChunk:
        found = EncodedChunk(chunk, [], [], [], faults)
        for index, row in zip(indices, rows, strict=True):
            try:
                found.encoded.extend(self._preprocessor.encode([row]))
            except RowError as error:
                faults[index] = f"`{self._column}` {error.fault}"
                continue
            found.indices.append(index)
            found.rows.append(row)
        return found

    def score(self, ready: EncodedChunk) -> ScoredChunk:
        """Compute the predictions of a chunk.

        Raises:
            Exception: The model fails at every row.
        """
        found = self._predict(ready.rows, ready.encoded)
        errors = [each for each in found if isinstance(each, Exception)]
        if errors and len(errors) == len(found):
            raise errors[0]
        faults = {
            index: f"the model failed at it ({type(each).__name__})"
            for index, each in zip(ready.indices, found, strict=True)
            if isinstance(each, Exception)
        }
        return ScoredChunk(
            ready.chunk,
            [index for index in ready.indices if index not in faults],
            [each for each in found if not isinstance(each, Exception)],
            {**ready.faults, **faults},
        )

    def _predict(self, rows: Sequence[Row], encoded: Sequence[Any]) -> list[Any]:
        """Predictions of all rows; the error at those at which the model fails."""
        if not rows:
            return []
        try:
            logits = self._service.batcher.submit(encoded, dedup_keys=rows, bounded=False)
            return self._service.formatter.to_objects(logits, self._top_k)
        except Exception as error:
            if len(rows) == 1:
                return [error]
        middle = len(rows) // 2
        return [
            *self._predict(rows[:middle], encoded[:middle]),
            *self._predict(rows[middle:], encoded[middle:]),
        ]


def one_ahead(make: Callable[[], _T | None]) -> Generator[_T, None, None]:
    """Results of `make` until one is None; a thread makes the next one meanwhile."""
    with ThreadPoolExecutor(1, "reader") as pool:
        future = pool.submit(make)
        while (result := future.result()) is not None:
            future = pool.submit(make)
            yield result
