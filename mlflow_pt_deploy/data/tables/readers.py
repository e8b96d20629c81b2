"""Read tables in chunks: memory holds one chunk, whatever the size of the file."""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from mlflow_pt_deploy.data.csv_reader import CsvRows
from mlflow_pt_deploy.data.label_kinds import format_list
from mlflow_pt_deploy.data.tables.chunk import ArrowChunk, Chunk, Record, RecordChunk
from mlflow_pt_deploy.errors import DataError

STANDARD_STREAM = "-"
SUFFIXES = (".parquet", ".csv", ".csv.gz", ".jsonl")

_BUFFER_BYTES = 2**20
_PARQUET_ROWS = 1024


class TableReader(Protocol):
    """An open table.

    Attributes:
        names: Names of its columns; None if each row has its own.
        total: Size of the input in `unit`; 0 if it is unknown.
        unit: ``rows`` or ``bytes``.
        position: How much was read, in `unit`; bytes if the size is unknown.
    """

    names: Sequence[str] | None
    total: int
    unit: str

    @property
    def position(self) -> int: ...

    def read(self, rows: int) -> Chunk | None:
        """The next rows, at most `rows`; None at the end."""

    def close(self) -> None:
        """Close the file."""


def suffix_of(name: str) -> str:
    """The format of a table by its name.

    Raises:
        DataError: The format is not supported.
    """
    if name == STANDARD_STREAM:
        return ".jsonl"
    for suffix in SUFFIXES:
        if name.endswith(suffix):
            return suffix
    raise DataError(
        f"{name} has an unsupported format. Supported formats: {', '.join(SUFFIXES)}; "
        f"{STANDARD_STREAM} is JSON lines on standard input or output."
    )


def open_table(name: str, skip: int = 0) -> TableReader:
    """Open a table.

    Args:
        name: A file, or ``-`` for JSON lines on standard input.
        skip: Rows to skip.

    Raises:
        DataError: The file cannot be read, or pyarrow is missing for Parquet.
    """
    suffix, file = suffix_of(name), Path(name)
    if name == STANDARD_STREAM:
        return _JsonLinesReader(sys.stdin.buffer, 0, skip)
    try:
        if suffix == ".parquet":
            return _ParquetReader(file, skip)
        if suffix == ".jsonl":
            return _JsonLinesReader(file.open("rb"), file.stat().st_size, skip)
        return _CsvReader(file, skip)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or "it is damaged or truncated"
        raise DataError(f"{name} cannot be read: {reason}.") from error


def require_pyarrow() -> None:
    """Check that Parquet can be read and written.

    Raises:
        DataError: pyarrow is not installed.
    """
    try:
        import pyarrow.parquet  # type: ignore[import-untyped]  # noqa: F401
    except ModuleNotFoundError as error:
        raise DataError(
            "Parquet needs pyarrow, which is not installed. Install it with: pip install pyarrow; "
            "or use .csv or .jsonl."
        ) from error


def _check_unique(file: Path, names: Sequence[str]) -> None:
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise DataError(
            f"{file.name} has several columns with the name {format_list(map(repr, twice))}. "
            "Rename or remove all but one."
        )


class _CsvReader:
    unit = "bytes"

    def __init__(self, file: Path, skip: int) -> None:
        self._rows = CsvRows(file.name, file, strict=False)
        self.names: Sequence[str] | None = self._rows.header
        self.total = file.stat().st_size
        self._file, self._next = file, skip + 1
        self._iterator = iter(self._rows)
        try:
            _check_unique(file, self._rows.header)
            for _ in islice(self._iterator, skip):
                pass
        except BaseException:
            self.close()
            raise

    def read(self, rows: int) -> Chunk | None:
        try:
            found = list(islice(self._iterator, rows))
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{self._file} is damaged or truncated. Write it again.") from error
        if not found:
            return None
        records: list[Record] = [
            {} if row.fault else dict(zip(self._rows.header, row.cells, strict=True))
            for row in found
        ]
        first, self._next = self._next, self._next + len(found)
        faults = {index: row.fault for index, row in enumerate(found) if row.fault}
        lines = [row.line for row in found]
        return RecordChunk(first, self.position, records, lines, faults)

    @property
    def position(self) -> int:
        return self._rows.position

    def close(self) -> None:
        self._rows.close()


class _JsonLinesReader:
    def __init__(self, binary: BinaryIO, total: int, skip: int) -> None:
        self.names: Sequence[str] | None = None
        self.total, self.unit = total, "bytes" if total else "rows"
        self._binary, self._next, self.position = binary, skip + 1, 0
        self._lines = self._numbered_lines()
        for _ in islice(self._lines, skip):
            pass

    def read(self, rows: int) -> Chunk | None:
        records: list[Record] = []
        lines: list[int] = []
        faults = {}
        for number, line in islice(self._lines, rows):
            record, fault = _parse_record(line)
            if fault:
                faults[len(records)] = fault
            records.append(record)
            lines.append(number)
        if not records:
            return None
        first, self._next = self._next, self._next + len(records)
        return RecordChunk(first, self.position, records, lines, faults)

    def close(self) -> None:
        if self._binary is not sys.stdin.buffer:
            self._binary.close()

    def _numbered_lines(self) -> Iterator[tuple[int, bytes]]:
        for number, line in enumerate(self._binary, start=1):
            self.position += len(line)
            if line.strip():
                yield number, line


def _parse_record(line: bytes) -> tuple[Record, str]:
    """The record of a line, or an empty one and the fault."""
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return {}, "is not UTF-8"
    except (ValueError, RecursionError):
        return {}, "is not JSON"
    return (record, "") if isinstance(record, dict) else ({}, "is not a JSON object")


class _ParquetReader:
    unit = "rows"

    def __init__(self, file: Path, skip: int) -> None:
        require_pyarrow()
        import pyarrow as pa
        from pyarrow.parquet import ParquetFile

        self._file = file
        try:
            # with a buffer, column chunks are not read as a whole
            self._table = ParquetFile(file, buffer_size=_BUFFER_BYTES)
        except pa.ArrowException as error:
            raise DataError(
                f"{file} cannot be read: it is not a Parquet file, or is damaged. Write it again."
            ) from error
        self.names: Sequence[str] | None = list(self._table.schema_arrow.names)
        self.total = int(self._table.metadata.num_rows)
        self._next = skip + 1
        self._batches = self._batches_from(skip)
        # also a table without rows has a chunk, for the types of its columns
        self._empty = not self.total
        self._batch: Any = None
        _check_unique(file, self._table.schema_arrow.names)

    def _batches_from(self, skip: int) -> Iterator[Any]:
        metadata = self._table.metadata
        groups = list(range(metadata.num_row_groups))
        while groups and (rows := metadata.row_group(groups[0]).num_rows) <= skip:
            skip -= rows
            del groups[0]
        for batch in self._table.iter_batches(_PARQUET_ROWS, row_groups=groups):
            if skip < batch.num_rows:
                yield batch.slice(skip)
            skip = max(0, skip - batch.num_rows)

    def read(self, rows: int) -> Chunk | None:
        import pyarrow as pa

        parts: list[Any] = []
        while rows and self._fill():
            part = self._batch.slice(0, rows)
            self._batch = self._batch.slice(part.num_rows)
            rows -= part.num_rows
            parts.append(part)
        if self._empty:
            parts = [pa.RecordBatch.from_pylist([], self._table.schema_arrow)]
            self._empty = False
        if not parts:
            return None
        batch = pa.concat_batches(parts) if len(parts) > 1 else parts[0]
        first, self._next = self._next, self._next + batch.num_rows
        return ArrowChunk(first, self.position, batch)

    @property
    def position(self) -> int:
        return self._next - 1

    def _fill(self) -> bool:
        """Have a batch with rows left; False at the end."""
        import pyarrow as pa

        try:
            while self._batch is None or not self._batch.num_rows:
                self._batch = next(self._batches)
        except StopIteration:
            return False
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self._file} is damaged. Write it again.") from error
        return True

    def close(self) -> None:
        self._table.close()
