"""Strict CSV reader: every cell is a string, unchanged.

pandas guesses types, pads short lines and shifts long ones. This reader names the line instead:
`read_csv` raises an error, `CsvRows` marks the row and goes on.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from mlflow_pt_deploy.errors import DataError

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_QUOTES = (
    'Put texts with commas, quotes or line breaks in double quotes ("..."), and double the quotes '
    "inside them"
)
_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
# Line ends of classic Mac OS; binary files are split at line feeds only.
_LONE_RETURN = re.compile(r"(?<=\r)(?!\n)")
# A quote that is not closed makes one cell of the rest of the file.
_MAX_CELL = 64 * 2**20
Table = dict[str, list[str]]
"""The cells of each column."""


class CsvRow(NamedTuple):
    """A row of a CSV file.

    Attributes:
        line: Number of its first line.
        cells: Its cells; as many as the header has, unless there is a fault.
        fault: Why it cannot be used; empty if it can.
    """

    line: int
    cells: list[str]
    fault: str = ""


class CsvRows:
    """An open CSV file, plain or gzip: its header, and its rows one at a time.

    Args:
        where: The split and the file, for error messages.
        file: Path of the file; a name that ends in ``.gz`` is decompressed.
        strict: Whether a line that is not UTF-8 is an error; otherwise it is the fault of its row.

    Attributes:
        header: Names of the columns.
        delimiter: One of `DELIMITERS`.

    Raises:
        DataError: The file is empty or not UTF-8, or its quotes do not match.
        OSError: The file cannot be read.
    """

    def __init__(self, where: str, file: Path, *, strict: bool = True) -> None:
        # process-wide; the default is 128 KiB per cell
        csv.field_size_limit(sys.maxsize if strict else _MAX_CELL)
        self._where, self._strict, self._damaged = where, strict, False
        self._raw = file.open("rb")
        try:
            _check_encoding(where, _open(self._raw, file).read(4096))
            self._raw.seek(0)
            self._read_header(file)
        except BaseException:
            self._raw.close()
            raise

    def _read_header(self, file: Path) -> None:
        lines = self._decoded(_open(self._raw, file))
        first = next((line for line in lines if line.strip("\r\n ")), None)
        if first is None:
            raise DataError(
                f"{self._where} cannot be read: it is empty. Write a header line `text,label` and "
                "rows, or remove the file."
            )
        self.delimiter = _delimiter(first)
        self._reader = csv.reader(chain([first], lines), delimiter=self.delimiter, strict=True)
        self.header = self._next_row(1) or []
        if self._damaged:
            raise _not_utf8(self._where, 1)

    def __iter__(self) -> Iterator[CsvRow]:
        begin = self._reader.line_num + 1
        while (cells := self._next_row(begin)) is not None:
            if cells:  # an empty line has none
                yield CsvRow(begin, cells, self._fault(cells))
            begin = self._reader.line_num + 1

    @property
    def position(self) -> int:
        """Bytes of the file that were read."""
        return self._raw.tell()

    def close(self) -> None:
        """Close the file."""
        self._raw.close()

    def _next_row(self, begin: int) -> list[str] | None:
        try:
            return next(self._reader, None)
        except csv.Error as error:
            raise DataError(
                f"{self._where} is not valid CSV: in the row that starts at line {begin} a quote "
                f"is not closed, or text follows a closing quote. {_QUOTES}."
            ) from error

    def _fault(self, cells: Sequence[str]) -> str:
        damaged, self._damaged = self._damaged, False
        if damaged:
            return "is not UTF-8"
        if len(cells) == len(self.header):
            return ""
        return (
            f"has {_cells(cells)} and the header has {len(self.header)}, separated by "
            f"{DELIMITERS[self.delimiter]}"
        )

    def _decoded(self, binary: Iterable[bytes]) -> Iterator[str]:
        """Decode lines; keep line ends and remove a byte order mark."""
        for number, line in enumerate(binary, start=1):
            encoding = "utf-8-sig" if number == 1 else "utf-8"
            try:
                text, damaged = line.decode(encoding), False
            except UnicodeDecodeError as error:
                if self._strict:
                    raise _not_utf8(self._where, number) from error
                text, damaged = line.decode(encoding, "replace"), True
            lone = "\r" in text.removesuffix("\r\n")
            for part in filter(None, _LONE_RETURN.split(text) if lone else (text,)):
                self._damaged = self._damaged or damaged
                yield part


def read_csv(where: str, file: Path, check: Callable[[Sequence[str]], object]) -> tuple[Table, str]:
    """Read a CSV file, plain or gzip.

    Args:
        where, file: See `CsvRows`.
        check: Called with the column names before rows are read; raises if they are invalid.

    Returns:
        The columns, and the delimiter.

    Raises:
        DataError: The file is empty, is not UTF-8, or a line has a wrong number of cells.
        OSError: The file cannot be read.
    """
    with closing(CsvRows(where, file)) as rows:
        check(rows.header)
        columns: list[list[str]] = [[] for _ in rows.header]
        for row in rows:
            if row.fault:
                raise DataError(f"{where} cannot be read: line {row.line} {row.fault}. {_QUOTES}.")
            for cells, cell in zip(columns, row.cells, strict=True):
                cells.append(cell)
        return dict(zip(rows.header, columns, strict=True)), rows.delimiter


def _open(raw: BinaryIO, file: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if file.name.endswith(".gz") else raw


def _not_utf8(where: str, line: int) -> DataError:
    return DataError(
        f"{where} cannot be read: it is not UTF-8. Save it as UTF-8 (in Excel: CSV UTF-8); "
        f"line {line} is the first that is not."
    )


def _check_encoding(where: str, start: bytes) -> None:
    found = next((name for mark, name in _BYTE_ORDER_MARKS.items() if start.startswith(mark)), "")
    if not found and start.count(0) > len(start) / 5:
        found = "UTF-16"
    if found:
        raise DataError(
            f"{where} cannot be read: it is not UTF-8 but {found}. Save it as UTF-8 (in Excel: "
            "CSV UTF-8)."
        )


def _delimiter(header: str) -> str:
    """Find the delimiter of a header: it yields a column `label`, or else the most columns."""
    names = {each: next(csv.reader([header], delimiter=each), []) for each in DELIMITERS}

    def score(delimiter: str) -> tuple[bool, int, bool]:
        found = names[delimiter]
        return "label" in found and len(found) > 1, len(found), delimiter == ","

    return max(DELIMITERS, key=score)


def _cells(row: Sequence[str]) -> str:
    return "1 cell" if len(row) == 1 else f"{len(row)} cells"
