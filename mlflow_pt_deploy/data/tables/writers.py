"""Write tables in chunks, so that an interrupted writer can continue.

A writer owns files in a folder. Line formats append to one file. A Parquet file cannot be appended
to after its writer is closed, so Parquet is written as several files, which `finish` joins by
streaming their rows.
"""

from __future__ import annotations

import base64
import csv
import gzip
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

from mlflow_pt_deploy.data.tables.chunk import Chunk, Record
from mlflow_pt_deploy.errors import DataError
from mlflow_pt_deploy.system import interrupt

_GROUP_ROWS = 65_536
_GROUP_BYTES = 64 * 2**20
_READ_ROWS = 4096


Added = Mapping[str, Sequence[object]]
"""Values of each added column, one for each row."""


class TableWriter(Protocol):
    """Writes rows with added columns."""

    def append(self, chunk: Chunk, indices: Sequence[int], added: Added) -> None:
        """Write rows of a chunk.

        Args:
            chunk: The rows that were read.
            indices: Those to write.
            added: Values of the added columns for these rows.
        """

    def flush(self) -> None:
        """Complete the files, so that a later writer can continue after these rows."""

    def finish(self) -> Path:
        """Complete the table; returns its file."""

    def close(self) -> None:
        """Close the files as they are."""


def open_writer(
    folder: Path, suffix: str, names: Sequence[str], added: Mapping[str, str]
) -> TableWriter:
    """Create a writer, or continue with the files that an earlier one completed.

    Args:
        folder: Folder of its files.
        suffix: Format of the table.
        names: Columns of the input, for CSV; other formats take those of the chunks.
        added: Types of the added columns: ``string``, ``double``, ``list<string>``, ...
    """
    if suffix == ".parquet":
        return _ParquetWriter(folder, added)
    file = folder / f"rows{suffix}"
    if suffix == ".jsonl":
        return JsonLinesWriter(file.open("ab"), file)
    return _CsvWriter(file, names, added)


def _records(chunk: Chunk, indices: Sequence[int], added: Added) -> Iterator[Record]:
    """Rows with the added values."""
    rows = zip(*added.values(), strict=True)
    for record, values in zip(chunk.take(indices), rows, strict=True):
        yield {**record, **dict(zip(added, values, strict=True))}


class _LineWriter:
    """Appends to an open file.

    Args:
        binary: The file.
        file: Its path.
    """

    def __init__(self, binary: BinaryIO, file: Path) -> None:
        self._binary, self._file = binary, file

    def flush(self) -> None:
        self._binary.flush()

    def finish(self) -> Path:
        self.close()
        return self._file

    def close(self) -> None:
        self._binary.close()


class JsonLinesWriter(_LineWriter):
    """Appends JSON lines to an open file."""

    def append(self, chunk: Chunk, indices: Sequence[int], added: Added) -> None:
        self._binary.writelines(map(_json_line, _records(chunk, indices, added)))


def _json_line(record: Mapping[str, object]) -> bytes:
    plain = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in record.items()
    }
    try:
        return f"{json.dumps(plain, ensure_ascii=False, default=_plain)}\n".encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return f"{json.dumps(plain, default=_plain)}\n".encode()


def _plain(value: object) -> str:
    """Text of a value that JSON lacks: bytes as base64, dates in ISO format."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return str(value.isoformat() if hasattr(value, "isoformat") else value)


class _CsvWriter(_LineWriter):
    def __init__(self, file: Path, names: Sequence[str], added: Iterable[str]) -> None:
        super().__init__(file.open("ab"), file)
        self._names = names
        if not self._binary.tell():
            self._write([[*names, *added]])

    def append(self, chunk: Chunk, indices: Sequence[int], added: Added) -> None:
        rows = zip(chunk.take(indices), zip(*added.values(), strict=True), strict=True)
        self._write(
            [
                value if type(value) in _WRITABLE else _cell(value)
                for value in (*map(record.get, self._names), *values)
            ]
            for record, values in rows
        )

    def _write(self, rows: Iterable[Sequence[object]]) -> None:
        rows = list(rows)
        text = self._format(rows, csv.QUOTE_MINIMAL)
        if "\r" in text:  # the module quotes only the line end that it writes
            text = self._format(rows, csv.QUOTE_ALL)
        content = text.encode("utf8", "replace")
        # consecutive gzip members are one file
        self._binary.write(gzip.compress(content) if self._file.suffix == ".gz" else content)

    def _format(self, rows: Sequence[Sequence[object]], quoting: Literal[0, 1]) -> str:
        text = StringIO(newline="")
        writer = csv.writer(text, quoting=quoting, lineterminator="\n")
        writer.writerows(rows)
        return text.getvalue()


_WRITABLE = frozenset({str, int, float, bool, type(None)})
"""Types of which the csv module writes what is wanted."""


def _cell(value: object) -> str:
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False, default=_plain)
    return _plain(value)


class _ParquetWriter:
    def __init__(self, folder: Path, added: Mapping[str, str]) -> None:
        import pyarrow as pa  # type: ignore[import-untyped]
        from pyarrow.parquet import read_schema  # type: ignore[import-untyped]

        self._folder = folder
        self._files = sorted(folder.glob("[0-9]*.parquet"))
        self._types = {name: _arrow_type(kind) for name, kind in added.items()}
        self._schema = pa.schema([])
        self._part: Any = None
        for file in self._files:
            self._merge(read_schema(file))

    def append(self, chunk: Chunk, indices: Sequence[int], added: Added) -> None:
        import pyarrow as pa

        table = chunk.table(indices)
        if not table.num_columns:  # no records
            return
        for name, values in added.items():
            table = table.append_column(name, pa.array(values, self._types[name]))
        # the features of Hugging Face's metadata do not name the added columns
        metadata = dict(table.schema.metadata or {})
        metadata.pop(b"huggingface", None)
        self._write(table.replace_schema_metadata(metadata))

    def _write(self, table: Any) -> None:
        from pyarrow.parquet import ParquetWriter

        self._merge(table.schema)
        if self._part is not None and self._part.schema != table.schema:
            self.flush()
        if self._part is None:
            self._files.append(self._folder / f"{len(self._files):05}.parquet")
            self._part = ParquetWriter(self._files[-1], table.schema)
        self._part.write_table(table)

    def _merge(self, schema: Any) -> None:
        import pyarrow as pa

        try:
            merged = pa.unify_schemas([self._schema, schema], promote_options="permissive")
        except pa.ArrowException as error:
            raise DataError(
                "a column has values of different types in different rows, which Parquet cannot "
                "store. Write .jsonl."
            ) from error
        self._schema = merged.with_metadata(schema.metadata)

    def flush(self) -> None:
        if self._part is not None:
            self._part.close()
            self._part = None

    def finish(self) -> Path:
        import pyarrow as pa
        from pyarrow.parquet import ParquetWriter

        self.flush()
        joined = self._folder / "joined.parquet"
        fields = [field for field in self._schema if field.name not in self._types]
        schema = pa.schema(
            [*fields, *(pa.field(name, kind) for name, kind in self._types.items())],
            self._schema.metadata,
        )
        with ParquetWriter(joined, schema) as writer:
            for group in self._groups(schema.empty_table()):
                interrupt.check()
                writer.write_table(group)
        return joined

    def _groups(self, empty: Any) -> Iterator[Any]:
        """Rows of all files, as tables that are large enough for a row group."""
        import pyarrow as pa

        group, rows, size = [empty], 0, 0
        for batch in self._batches():
            group.append(pa.Table.from_batches([batch]))
            rows, size = rows + batch.num_rows, size + batch.nbytes
            if rows >= _GROUP_ROWS or size >= _GROUP_BYTES:
                yield pa.concat_tables(group, promote_options="permissive")
                group, rows, size = [empty], 0, 0
        if rows:
            yield pa.concat_tables(group, promote_options="permissive")

    def _batches(self) -> Iterator[Any]:
        from pyarrow.parquet import ParquetFile

        for file in self._files:
            with ParquetFile(file) as part:
                yield from part.iter_batches(_READ_ROWS)

    def close(self) -> None:
        self.flush()


def _arrow_type(kind: str) -> Any:
    import pyarrow as pa

    inner = kind.removeprefix("list<").removesuffix(">")
    scalar = pa.type_for_alias(inner)
    return scalar if inner == kind else pa.list_(scalar)
