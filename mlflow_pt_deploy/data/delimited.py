"""CSV files: every cell a text, as it stands there.

pandas guesses types, fills short lines and shifts long ones; here a line that does not fit is an
error with its number. Knows nothing of what the columns mean, except to find the delimiter.
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
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
# Old Macs end lines so; binary files are split at line feeds only.
_LONE_RETURN = re.compile(r"(?<=\r)(?!\n)")
Table = dict[str, list[str]]
"""The cells of each column."""


def read_csv(where: str, file: Path, check: Callable[[Sequence[str]], object]) -> tuple[Table, str]:
    """Read a CSV file, plain or gzip.

    Args:
        where: The split and file, as a message shall name them.
        file: Its path; one that ends in ``.gz`` is unpacked.
        check: Given the names of the columns before any row is read; raises where they are wrong.

    Returns:
        The columns, and the delimiter.

    Raises:
        DataError: It is empty, not UTF-8, or a line does not fit; says which.
        OSError: It cannot be read.
    """
    csv.field_size_limit(sys.maxsize)  # of the whole process; the default is 128 KiB a cell
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
    found = next((name for mark, name in _MARKS.items() if start.startswith(mark)), "")
    if not found and start.count(0) > len(start) / 5:
        found = "UTF-16"
    if found:
        raise DataError(
            f"{where} cannot be read: it is not UTF-8 but {found}. Save it as UTF-8 (in Excel: "
            "CSV UTF-8)."
        )


def _decoded(where: str, binary: Iterable[bytes]) -> Iterator[str]:
    """The lines as text, each with its end, and without a byte order mark."""
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
    """What separates the names in the header: the one that finds `label`, else the most names."""
    names = {mark: next(csv.reader([header], delimiter=mark), []) for mark in DELIMITERS}

    def fit(mark: str) -> tuple[bool, int, bool]:
        return "label" in names[mark] and len(names[mark]) > 1, len(names[mark]), mark == ","

    return max(DELIMITERS, key=fit)


def _rows(
    where: str,
    lines: Iterable[str],
    delimiter: str,
    check: Callable[[Sequence[str]], object],
) -> Table:
    """The columns; a row that has fewer or more cells than the header is an error."""
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
                    f"header has {len(header)}, with {DELIMITERS[delimiter]} between. {_QUOTES}."
                )
            for cells, cell in zip(columns, row, strict=False):  # an empty line has none
                cells.append(cell)
            begin = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{where} is not well-formed CSV: in the row that begins in line {begin} a quote is "
            f"not closed, or text follows it. {_QUOTES}."
        ) from error
    return dict(zip(header, columns, strict=True))


def _cells(row: Sequence[str]) -> str:
    return "1 cell" if len(row) == 1 else f"{len(row)} cells"
