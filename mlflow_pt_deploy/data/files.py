"""Read splits from CSV and Parquet files: a folder with one file per split, or a single file.

A CSV file contains paths of images, relative to its own folder; Parquet contains their bytes.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mlflow_pt_deploy.data.columns import LABEL
from mlflow_pt_deploy.data.csv_reader import DELIMITERS, read_csv
from mlflow_pt_deploy.data.label_kinds import format_list
from mlflow_pt_deploy.data.splits import Splits, build_splits
from mlflow_pt_deploy.data.validation import (
    Pairs,
    check_columns,
    reject_indicator_columns,
    reject_rows,
)
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
    "Add train.csv, train.csv.gz or train.parquet, and optionally validation (or valid, val, dev) "
    "and test; or give a single file as --data."
)
_ARCHIVES = (".zip", ".gz", ".bz2", ".xz", ".zst", ".tar", ".7z")
_SAMPLE_ROWS = 1000
"""Number of rows to inspect in a table without labels."""


def read_files(path: Path, *, source: str, seed: int) -> Splits:
    """Read a folder of splits, or a single file as train.

    Args:
        path: The folder or the file.
        source: The value of ``--data``.
        seed: Random seed for cutting splits that have no file.

    Raises:
        DataError: A file is missing, ambiguous or unreadable, or has rows that cannot be used.
    """
    try:
        files = _find_files(path) if path.is_dir() else {"train": path}
    except OSError as error:
        raise DataError(f"{path} cannot be read: {_describe_error(error)}") from error
    read = {split: _read_table(split, file) for split, file in files.items()}
    columns = {table.column for table in read.values()}
    if len(columns) > 1:
        raise DataError(
            f"{path} has different input columns in its files: {format_list(sorted(columns))}. Use "
            "the same input column in all splits."
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
    """Describe columns that are not used, if there are any.

    Args:
        unused: Names of unused columns by split.
    """
    if not any(unused.values()):
        return []
    if len({tuple(sorted(names)) for names in unused.values()}) == 1:
        names = next(iter(unused.values()))
        return [f"{'columns' if len(names) > 1 else 'column'} not used: {format_list(names)}"]
    each = "; ".join(f"{split}: {format_list(names)}" for split, names in unused.items() if names)
    return [f"columns not used (different between splits): {each}"]


def _find_files(folder: Path) -> dict[str, Path]:
    files = {}
    for split, stems in STEMS.items():
        names = [stem + suffix for stem in stems for suffix in SUFFIXES]
        found = [folder / name for name in names if (folder / name).is_file()]
        if len(found) > 1:
            both = " and ".join(file.name for file in found)
            raise DataError(
                f"{folder} has more than one file for {split}: {both}. Keep one of them."
            )
        if found:
            files[split] = found[0]
    if "train" not in files:
        raise DataError(f"{folder} has no train file; {_describe_contents(folder)}. {_LAYOUT}")
    return files


def _describe_contents(folder: Path) -> str:
    """List the contents of a folder for an error message."""
    names = sorted(f"{each.name}/" if each.is_dir() else each.name for each in folder.iterdir())
    if not names:
        return "it is empty"
    if all(name.endswith("/") for name in names):
        return f"it contains the folders {format_list(names)}, and subfolders are not read"
    return f"it contains {format_list(names)}"


def _suffix(file: Path) -> str:
    for suffix in SUFFIXES:
        if file.name.endswith(suffix):
            return suffix
    hint = ""
    if file.name.endswith(".tsv"):
        hint = " Tab-separated files are supported: rename it to .csv."
    elif file.suffix in _ARCHIVES:
        hint = " Extract it first."
    elif file.suffix in (".json", ".jsonl", ".ndjson"):
        hint = " Convert it, e.g. with pandas: read_json(..., lines=True).to_parquet(...)."
    raise DataError(f"{file} has an unsupported format. Supported formats: {_FORMATS}.{hint}")


class _Table(NamedTuple):
    """Contents of a file.

    Attributes:
        column: Name of the input column.
        pairs: Inputs and labels.
        unused: Names of the other columns.
        note: A remark on how the file was read, or empty.
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
    # pyarrow's errors derive from several built-in types, gzip's from OSError.
    except (OSError, EOFError, ValueError, LookupError, TypeError, ArithmeticError) as error:
        raise DataError(f"{file} cannot be read: {_describe_error(error)}") from error
    except (NotImplementedError, zlib.error) as error:
        raise DataError(f"{file} cannot be read: {_describe_error(error)}") from error
    if table.column == "image":
        rows, labels = table.pairs
        return table._replace(pairs=(read_images(split, list(rows), file.parent), labels))
    return table


def read_images(split: str, values: list[object], folder: Path) -> list[object]:
    """Load the bytes of each image from bytes, a path, or Hugging Face's struct of both.

    Args:
        split: Name of the split, for error messages.
        values: Cells of the table; other types are returned unchanged and rejected later.
        folder: Base folder of relative paths.

    Raises:
        DataError: A path does not name a file.
    """
    found = [image_file(value, folder) for value in values]
    fault = f"does not name a file in the folder {folder.name}"
    reject_rows(
        split, "image", found, fault, lambda file: isinstance(file, Path) and not _exists(file)
    )
    return [file.read_bytes() if isinstance(file, Path) else file for file in found]


def image_file(value: object, folder: Path) -> object:
    """The path of an image file, if a cell names one; else its content.

    Args:
        value: Bytes, a path, or Hugging Face's struct of both.
        folder: Base folder of relative paths.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    return folder / value if isinstance(value, str) and value else value


def _exists(file: Path) -> bool:
    try:
        return file.is_file()
    except OSError:  # an invalid file name
        return False


def _read_csv(where: str, file: Path) -> _Table:
    header: list[str] = []

    def check(names: Sequence[str]) -> None:
        header.extend(names)
        if LABEL in names:  # without labels, the first rows are inspected for other tasks first
            check_columns(where, names, header=True)

    cells, delimiter = read_csv(where, file, check)
    if LABEL not in header:
        reject_indicator_columns(
            where, {name: column[:_SAMPLE_ROWS] for name, column in cells.items()}
        )
    column = check_columns(where, header, header=True)
    note = "" if delimiter == "," else f"{where}: columns are separated by {DELIMITERS[delimiter]}"
    return _Table(column, (cells[column], cells[LABEL]), _others(header, column), note)


def _read_parquet(where: str, file: Path) -> _Table:
    import pandas as pd
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    # Read the schema first, so that no other column is loaded.
    names = pq.read_schema(file).names
    if LABEL not in names:
        first = next(pq.ParquetFile(file).iter_batches(_SAMPLE_ROWS), None)
        reject_indicator_columns(where, first.to_pydict() if first is not None else {})
    column = check_columns(where, names)
    frame = pd.read_parquet(file, columns=[column, LABEL])
    rows, labels = _column(frame, column), _column(frame, LABEL)
    return _Table(column, (rows, labels), _others(names, column))


def _others(names: Sequence[str], column: str) -> list[str]:
    """Columns that are not used, except an index written by pandas."""
    return [
        name
        for name in names
        if name.strip() and name not in (column, LABEL) and not name.startswith("__index_level_")
    ]


def _column(frame: pd.DataFrame, name: str) -> list[object]:
    column = frame[name]
    values: list[object] = column.astype(object).where(column.notna(), None).tolist()
    return values


def _describe_error(error: Exception) -> str:
    if isinstance(error, PermissionError):
        return "permission denied. Make it readable for this user."
    return (
        f"its content does not match its name ({type(error).__name__}); it may be damaged or "
        f"truncated. Write it again as one of {_FORMATS}."
    )
