"""Splits from CSV and Parquet files: a folder with one file a split, or one file to cut.

A CSV names the files of its images, relative to its own folder; Parquet holds their bytes. Knows
file names and file formats; what is wrong with a row or a label, `checks` says.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mlflow_pt_deploy.columns import LABEL
from mlflow_pt_deploy.data.checks import Pairs, check_columns, refuse, refuse_flags
from mlflow_pt_deploy.data.delimited import DELIMITERS, read_csv
from mlflow_pt_deploy.data.labels import listed
from mlflow_pt_deploy.data.splits import Splits, build_splits
from mlflow_pt_deploy.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

SUFFIXES = (".csv", ".csv.gz", ".parquet")
STEMS = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}

_FORMATS = ", ".join(SUFFIXES)
_LAYOUT = (
    "Put train.csv, train.csv.gz or train.parquet there, and beside it, if you have them, "
    "validation (or valid, val, dev) and test; or give one file itself as --data."
)
_PACKED = (".zip", ".gz", ".bz2", ".xz", ".zst", ".tar", ".7z")
_LOOKED_AT = 1000
"""First rows that show what a table without labels holds instead."""


def read_files(path: Path, *, source: str, seed: int) -> Splits:
    """Read a folder of splits, or one file as train.

    Args:
        path: The folder or the file.
        source: What the user gave as ``--data``.
        seed: Decides which rows are cut for a split that has no file.

    Raises:
        DataError: A file is missing, double, unreadable, or has rows that cannot be used.
    """
    try:
        files = _find_files(path) if path.is_dir() else {"train": path}
    except OSError as error:
        raise DataError(f"{path} cannot be read: {_fault(error)}") from error
    read = {split: _read_table(split, file) for split, file in files.items()}
    columns = {table.column for table in read.values()}
    if len(columns) > 1:
        raise DataError(
            f"{path} has the column {listed(sorted(columns))}, one in each file. Give all splits "
            "the same kind of rows."
        )
    given = {split: table.pairs for split, table in read.items()}
    full_name = path.resolve().name
    suffix = "" if path.is_dir() else _suffix(path)
    return build_splits(
        given,
        name=full_name.removesuffix(suffix) or full_name,
        source=source,
        column=columns.pop(),
        seed=seed,
        notes=[
            *(table.note for table in read.values() if table.note),
            *unused_columns({split: table.unused for split, table in read.items()}),
        ],
    )


def unused_columns(unused: Mapping[str, Sequence[str]]) -> list[str]:
    """A note on columns that nothing reads, if there are any.

    Args:
        unused: Their names by split.
    """
    if not any(unused.values()):
        return []
    if len({tuple(sorted(names)) for names in unused.values()}) == 1:
        names = next(iter(unused.values()))
        return [f"{'columns' if len(names) > 1 else 'column'} not used: {listed(names)}"]
    each = "; ".join(f"{split}: {listed(names)}" for split, names in unused.items() if names)
    return [f"columns not used, which differ between the splits: {each}"]


def _find_files(folder: Path) -> dict[str, Path]:
    files = {}
    for split, stems in STEMS.items():
        names = [stem + suffix for stem in stems for suffix in SUFFIXES]
        found = [folder / name for name in names if (folder / name).is_file()]
        if len(found) > 1:
            both = " and ".join(file.name for file in found)
            raise DataError(
                f"{folder} has more than one file for {split}: {both}. Remove all but one."
            )
        if found:
            files[split] = found[0]
    if "train" not in files:
        raise DataError(f"{folder} has no train file; {_what_is_there(folder)}. {_LAYOUT}")
    return files


def _what_is_there(folder: Path) -> str:
    """What a folder holds, for a message."""
    names = sorted(f"{each.name}/" if each.is_dir() else each.name for each in folder.iterdir())
    if not names:
        return "it is empty"
    if all(name.endswith("/") for name in names):
        return f"it holds the folders {listed(names)}, and folders are not read"
    return f"it holds {listed(names)}"


def _suffix(file: Path) -> str:
    for suffix in SUFFIXES:
        if file.name.endswith(suffix):
            return suffix
    hint = ""
    if file.name.endswith(".tsv"):
        hint = " Tabs between the columns are understood: name it .csv."
    elif file.suffix in _PACKED:
        hint = " Unpack it first."
    elif file.suffix in (".json", ".jsonl", ".ndjson"):
        hint = " Convert it, e.g. with pandas: read_json(..., lines=True).to_parquet(...)."
    raise DataError(f"{file} is of no format that is read here. Allowed are {_FORMATS}.{hint}")


class _Table(NamedTuple):
    """What a file holds.

    Attributes:
        column: The name of the input column.
        pairs: Inputs and labels.
        unused: Names of the other columns.
        note: What a reader should know of how it was read, or empty.
    """

    column: str
    pairs: Pairs
    unused: list[str]
    note: str = ""


def _read_table(split: str, file: Path) -> _Table:
    where = f"{split} ({file.name})"
    read = _read_parquet if _suffix(file) == ".parquet" else _read_csv
    try:
        table = read(where, file)
    # What pyarrow raises derives from one of several of Python's own, gzip's from OSError.
    except (OSError, EOFError, ValueError, LookupError, TypeError, ArithmeticError) as error:
        raise DataError(f"{file} cannot be read: {_fault(error)}") from error
    except (NotImplementedError, zlib.error) as error:
        raise DataError(f"{file} cannot be read: {_fault(error)}") from error
    if table.column == "image":
        rows, labels = table.pairs
        return table._replace(pairs=(read_images(split, list(rows), file.parent), labels))
    return table


def read_images(split: str, values: list[object], folder: Path) -> list[object]:
    """The bytes of each image, from bytes, a path, or Hugging Face's struct of both.

    Args:
        split: The split, for the message.
        values: What a table holds; anything else is left as it is, for the checks to refuse.
        folder: Where relative paths begin.

    Raises:
        DataError: A path names no file.
    """
    found = [_bytes_or_path(value) for value in values]
    files = [folder / value if isinstance(value, str) and value else None for value in found]
    fault = f"names no file in the folder {folder.name}"
    refuse(split, "image", files, fault, lambda file: isinstance(file, Path) and not _exists(file))
    return [
        value if file is None else file.read_bytes()
        for value, file in zip(found, files, strict=True)
    ]


def _exists(file: Path) -> bool:
    try:
        return file.is_file()
    except OSError:  # no file can have such a name
        return False


def _bytes_or_path(value: object) -> object:
    if isinstance(value, dict):
        return value.get("bytes") or value.get("path")
    return value


def _read_csv(where: str, file: Path) -> _Table:
    header: list[str] = []

    def check(names: Sequence[str]) -> None:
        header.extend(names)
        if LABEL in names:  # else the first rows may say what it is instead
            check_columns(where, names, header=True)

    cells, delimiter = read_csv(where, file, check)
    if LABEL not in header:
        refuse_flags(where, {name: column[:_LOOKED_AT] for name, column in cells.items()})
    column = check_columns(where, header, header=True)
    note = "" if delimiter == "," else f"{where}: {DELIMITERS[delimiter]} between the columns"
    return _Table(column, (cells[column], cells[LABEL]), _others(header, column), note)


def _read_parquet(where: str, file: Path) -> _Table:
    import pandas as pd
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    # The schema first, so that no other column is read.
    names = pq.read_schema(file).names
    if LABEL not in names:
        first = next(pq.ParquetFile(file).iter_batches(_LOOKED_AT), None)
        refuse_flags(where, first.to_pydict() if first is not None else {})
    column = check_columns(where, names)
    frame = pd.read_parquet(file, columns=[column, LABEL])
    rows, labels = _column(frame, column), _column(frame, LABEL)
    return _Table(column, (rows, labels), _others(names, column))


def _others(names: Sequence[str], column: str) -> list[str]:
    """Columns that are not read; an index that pandas wrote is none."""
    return [
        name
        for name in names
        if name.strip() and name not in (column, LABEL) and not name.startswith("__index_level_")
    ]


def _column(frame: pd.DataFrame, name: str) -> list[object]:
    column = frame[name]
    values: list[object] = column.astype(object).where(column.notna(), None).tolist()
    return values


def _fault(error: Exception) -> str:
    if isinstance(error, PermissionError):
        return "permission denied. Make it readable for this user."
    return (
        f"its content does not fit its name ({type(error).__name__}); it may be damaged or cut "
        f"off. Write it anew, as one of {_FORMATS}."
    )
