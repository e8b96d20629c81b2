"""Strict CSV reader: every cell is a string, unchanged.

pandas guesses types, pads short lines and shifts long ones. This reader raises an error with the
line number instead.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import BinaryIO, cast

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
Table = dict[str, list[str]]
"""The cells of each column."""


def read_csv(where: str, file: Path, check: Callable[[Sequence[str]], object]) -> tuple[Table, str]:
    """Read a CSV file, plain or gzip.

    Args:
        where: The split and the file, for error messages.
        file: Path of the file; a name that ends in ``.gz`` is decompressed.
        check: Called with the column names before rows are read; raises if they are invalid.

    Returns:
        The columns, and the delimiter.

    Raises:
        DataError: The file is empty, is not UTF-8, or a line has a wrong number of cells.
        OSError: The file cannot be read.
    """
    csv.field_size_limit(sys.maxsize)  # process-wide; the default is 128 KiB per cell
    with _open(file) as binary:
        _check_encoding(where, binary.read(4096))
    with _open(file) as binary:
        lines = _decoded(where, binary)
        first = next((line for line in lines if line.strip("\r\n ")), None)
        if first is None:
            raise DataError(
                f"{where} cannot be read: it is empty. Write a header line `text,label` and rows, "
                "or remove the file."
            )
        delimiter = _delimiter(first)
        return _rows(where, chain([first], lines), delimiter, check), delimiter


def _open(file: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(file)) if file.name.endswith(".gz") else file.open("rb")


def _check_encoding(where: str, start: bytes) -> None:
    found = next((name for mark, name in _BYTE_ORDER_MARKS.items() if start.startswith(mark)), "")
    if not found and start.count(0) > len(start) / 5:
        found = "UTF-16"
    if found:
        raise DataError(
            f"{where} cannot be read: it is not UTF-8 but {found}. Save it as UTF-8 (in Excel: "
            "CSV UTF-8)."
        )


def _decoded(where: str, binary: Iterable[bytes]) -> Iterator[str]:
    """Decode lines; keep line ends and remove a byte order mark."""
    for number, line in enumerate(binary, start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{where} cannot be read: it is not UTF-8. Save it as UTF-8 (in Excel: CSV UTF-8); "
                f"line {number} is the first that is not."
            ) from error
        yield from filter(None, _LONE_RETURN.split(text))


def _delimiter(header: str) -> str:
    """Find the delimiter of a header: it yields a column `label`, or else the most columns."""
    names = {each: next(csv.reader([header], delimiter=each), []) for each in DELIMITERS}

    def score(delimiter: str) -> tuple[bool, int, bool]:
        found = names[delimiter]
        return "label" in found and len(found) > 1, len(found), delimiter == ","

    return max(DELIMITERS, key=score)


def _rows(
    where: str,
    lines: Iterable[str],
    delimiter: str,
    check: Callable[[Sequence[str]], object],
) -> Table:
    """Read the columns; every row must have as many cells as the header."""
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    begin = 1
    try:
        header = next(reader)
        check(header)
        columns: list[list[str]] = [[] for _ in header]
        begin = reader.line_num + 1
        for row in reader:
            if row and len(row) != len(header):
                raise DataError(
                    f"{where} cannot be read: line {begin} has {_cells(row)} and the "
                    f"header has {len(header)}, separated by {DELIMITERS[delimiter]}. {_QUOTES}."
                )
            for cells, cell in zip(columns, row, strict=False):  # an empty line has no cells
                cells.append(cell)
            begin = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{where} is not valid CSV: in the row that starts at line {begin} a quote is "
            f"not closed, or text follows a closing quote. {_QUOTES}."
        ) from error
    return dict(zip(header, columns, strict=True))


def _cells(row: Sequence[str]) -> str:
    return "1 cell" if len(row) == 1 else f"{len(row)} cells"
