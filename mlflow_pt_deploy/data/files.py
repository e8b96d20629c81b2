"""Splits from CSV and Parquet files: a folder with one file a split, or one file to cut.

A CSV names the files of its images, relative to its own folder; Parquet holds their bytes. Knows
file names and file formats; what is wrong with a row or a label, `checks` says.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from mlflow_pt_deploy.data.splits import Splits, build_splits
from mlflow_pt_deploy.data.validation import Pairs, check_columns, listed, refuse
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


def read_files(path: Path, *, source: str, seed: int) -> Splits:
    """Read a folder of splits, or one file as train.

    Args:
        path: The folder or the file.
        source: What the user gave as ``--data``.
        seed: Decides which rows are cut for a split that has no file.

    Raises:
        DataError: A file is missing, double, unreadable, or has rows that cannot be used.
    """
    files = _find_files(path) if path.is_dir() else {"train": path}
    read = {split: _read_pairs(split, file) for split, file in files.items()}
    columns = {column for column, _ in read.values()}
    if len(columns) > 1:
        raise DataError(
            f"{path} has the column {listed(sorted(columns))}, one in each file. Give all splits "
            "the same kind of rows."
        )
    given = {split: pairs for split, (_, pairs) in read.items()}
    full_name = path.resolve().name
    suffix = "" if path.is_dir() else _suffix(path)
    name = full_name.removesuffix(suffix) or full_name
    return build_splits(given, name=name, source=source, column=columns.pop(), seed=seed)


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
        raise DataError(
            f"{folder} has no train file. Put train.csv, train.csv.gz or train.parquet there "
            "(validation and test beside it, if you have them), or give one file itself."
        )
    return files


def _suffix(file: Path) -> str:
    for suffix in SUFFIXES:
        if file.name.endswith(suffix):
            return suffix
    raise DataError(f"{file} is of no format that is read here. Allowed are {_FORMATS}.")


def _read_pairs(split: str, file: Path) -> tuple[str, Pairs]:
    """The name of the input column, and the rows."""
    suffix = _suffix(file)
    where = f"{split} ({file.name})"
    try:
        frame = _read_parquet(where, file) if suffix == ".parquet" else _read_csv(where, file)
    # pandas and pyarrow derive their parse errors from ValueError, gzip its own from OSError.
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{file} cannot be read: {_fault(error)}") from error
    column = check_columns(where, [str(name) for name in frame.columns])
    rows = _column(frame, column)
    if column == "image":
        rows = read_images(split, rows, file.parent)
    return column, (rows, _column(frame, "label"))


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


def _read_csv(where: str, file: Path) -> pd.DataFrame:
    import pandas as pd

    frame = pd.read_csv(file, dtype=str, keep_default_na=False, encoding="utf-8")
    if not isinstance(frame.index, pd.RangeIndex):
        # pandas takes surplus fields for an index and would shift every column by one.
        raise DataError(
            f"{where}: rows have more fields than the header. Put texts with commas in double "
            'quotes ("...").'
        )
    return frame


def _read_parquet(where: str, file: Path) -> pd.DataFrame:
    import pandas as pd
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    # The schema first, so that no other column is read.
    column = check_columns(where, pq.read_schema(file).names)
    return pd.read_parquet(file, columns=[column, "label"])


def _column(frame: pd.DataFrame, name: str) -> list[object]:
    column = frame[name]
    values: list[object] = column.astype(object).where(column.notna(), None).tolist()
    return values


def _fault(error: Exception) -> str:
    import pandas as pd

    if isinstance(error, pd.errors.EmptyDataError):
        return "it is empty. Write a header line `text,label` and rows, or remove the file."
    if isinstance(error, pd.errors.ParserError):
        said = " ".join(str(error).split())
        return (
            f"it is not well-formed CSV ({said}). Put texts with commas, quotes or line breaks "
            'in double quotes ("..."), and double the quotes inside them.'
        )
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8. Save it as UTF-8 (in Excel: CSV UTF-8)."
    if isinstance(error, PermissionError):
        return "permission denied. Make it readable for this user."
    return (
        f"its content does not fit its name ({type(error).__name__}); it may be damaged or cut "
        f"off. Write it anew, as one of {_FORMATS}."
    )
