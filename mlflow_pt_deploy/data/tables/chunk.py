"""Consecutive rows of a table, as records or as an Arrow batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mlflow_pt_deploy.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa  # type: ignore[import-untyped]

Record = dict[str, object]


@dataclass(frozen=True)
class RecordChunk:
    """Rows of a CSV or JSON lines file.

    Attributes:
        first: Number of its first row, from 1.
        position: How much of the input was read after it, in the unit of the reader.
        records: One per row; empty if the row has a fault.
        lines: Number of the first line of each row.
        faults: Why a row cannot be used, by index.
    """

    first: int
    position: int
    records: Sequence[Record]
    lines: Sequence[int]
    faults: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.records)

    def names(self) -> list[str]:
        """Keys of all records, in order of appearance."""
        return list(dict.fromkeys(name for record in self.records for name in record))

    def values(self, name: str) -> list[object]:
        """Cells of a column; None where a record lacks it."""
        return [record.get(name) for record in self.records]

    def take(self, indices: Sequence[int]) -> Iterator[Record]:
        """Rows as records."""
        return (self.records[index] for index in indices)

    def table(self, indices: Sequence[int]) -> pa.Table:
        """Rows as an Arrow table; types are those of the values.

        Raises:
            DataError: A column has values of different types.
        """
        import pyarrow as pa

        records = list(self.take(indices))
        columns = {}
        for name in dict.fromkeys(name for record in records for name in record):
            try:
                columns[name] = pa.array([record.get(name) for record in records])
            except pa.ArrowException as error:
                raise DataError(
                    f"the column `{name}` has values of different types in rows {self.first} to "
                    f"{self.first + len(self) - 1}, which Parquet cannot store. Write .jsonl."
                ) from error
        return pa.table(columns)


@dataclass(frozen=True)
class ArrowChunk:
    """Rows of a Parquet file.

    Attributes:
        first, position, lines, faults: See `RecordChunk`; there are no lines.
        batch: The rows.
    """

    first: int
    position: int
    batch: pa.RecordBatch
    lines: Sequence[int] = ()
    faults: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.batch.num_rows)

    def names(self) -> list[str]:
        """Names of the columns."""
        return list(self.batch.schema.names)

    def values(self, name: str) -> list[object]:
        """Cells of a column as Python values; a text that is not UTF-8 is the fault of its row."""
        column = self.batch.column(name)
        try:
            return list(column.to_pylist())
        except UnicodeDecodeError:
            return [self._value(cell, index) for index, cell in enumerate(column)]

    def take(self, indices: Sequence[int]) -> Iterator[Record]:
        """Rows as records.

        Raises:
            DataError: A text in one of the columns is not UTF-8.
        """
        try:
            return iter(self.table(indices).to_pylist())
        except UnicodeDecodeError as error:
            raise DataError(
                f"a column has texts that are not UTF-8 in rows {self.first} to "
                f"{self.first + len(self) - 1}. Write .parquet, which keeps them."
            ) from error

    def table(self, indices: Sequence[int]) -> pa.Table:
        """Rows as an Arrow table."""
        import pyarrow as pa

        table = pa.Table.from_batches([self.batch])
        return table if len(indices) == len(self) else table.take(indices)

    def _value(self, cell: Any, index: int) -> object:
        try:
            return cell.as_py()
        except UnicodeDecodeError:
            self.faults[index] = "is not UTF-8"
            return None


Chunk = RecordChunk | ArrowChunk
