"""What must hold before rows may teach or judge a model, whatever source they come from.

Knows column names, rows and string labels; knows no file format and does not cut anything.
A message names row numbers and labels, never the content of a row: that is the user's data.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral

from mlflow_pt_deploy.errors import DataError

Pairs = tuple[Sequence[object], Sequence[object]]
"""Inputs and labels of one split as they were read, one of each a row."""

Row = str | bytes
"""One raw input: a text, or an encoded image (PNG, JPEG, ...)."""

Cleaned = tuple[tuple[Row, ...], tuple[str, ...]]
"""Inputs and labels of one split after the checks."""

COLUMNS = {"text": str, "image": bytes}
"""What the input column may be called, and what a row of it is."""

_SHOWN = 5
_NAME = re.compile(r"[A-Za-z_][\w.-]{0,29}")


def listed(items: Iterable[object]) -> str:
    """The first few items for a message: ``a, b, c, d, e and 7 more``."""
    everything = [str(item) for item in items]
    more = len(everything) - _SHOWN
    return ", ".join(everything[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def check_columns(where: str, columns: Sequence[str]) -> str:
    """Hold a table to a column of inputs, `text` or `image`, and to the column `label`.

    Args:
        where: The split or file, as the message shall name it.
        columns: Names of the columns that the table has.

    Returns:
        The name of the input column; ``text`` where there are both.

    Raises:
        DataError: A column is missing.
    """
    given = next((name for name in COLUMNS if name in columns), None)
    missing = [name for name in (given or "text", "label") if name not in columns]
    if given and not missing:
        return given
    wanted = " and ".join(f"`{name}`" for name in missing)
    # Without a header the "names" are the first row itself, which no message may show.
    if all(_NAME.fullmatch(name) for name in columns):
        found = f"it has {listed(columns)}"
    else:
        found = "its first line does not look like a header"
    raise DataError(
        f"{where} has no column {wanted}; {found}. "
        "Name the columns `text` (or `image`) and `label` in the first line, with a comma between."
    )


def check_rows(split: str, pairs: Pairs, column: str = "text") -> Cleaned:
    """Check one split and bring its labels to strings; inputs stay as they are.

    Labels may be strings, whose outer whitespace goes, or whole numbers.

    Args:
        split: Its name, for the message.
        pairs: Inputs and labels as they were read.
        column: One of `COLUMNS`.

    Raises:
        DataError: No rows; or an input or label that is missing, blank or of another type.
    """
    rows, labels = pairs
    if not len(rows):
        raise DataError(f"{split} has no rows. Add rows, or leave {split} out if it is not train.")
    kind, words = COLUMNS[column], {"text": "a string", "image": "the bytes of an image file"}
    refuse(split, column, rows, "is missing or blank", _is_blank)
    refuse(split, "label", labels, "is missing or blank", _is_blank)
    refuse(split, column, rows, f"is not {words[column]}", lambda v: not isinstance(v, kind))
    refuse(
        split,
        "label",
        labels,
        "is neither a string nor a whole number",
        lambda value: not isinstance(value, str | Integral),
    )
    return tuple(map(kind, rows)), tuple(str(label).strip() for label in labels)


def check_labels(labels: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Find the classes, which train alone defines.

    Args:
        labels: The labels of each split that exists; `train` always does.

    Returns:
        The classes, sorted.

    Raises:
        DataError: Train has one class only, or another split has labels that train lacks.
    """
    classes = set(labels["train"])
    if len(classes) < 2:
        raise DataError(
            f"train has one label only ({listed(classes)}); a classifier needs two or more. "
            "Add rows with other labels."
        )
    for split, names in labels.items():
        unknown = [name for name in names if name not in classes]
        if unknown:
            raise DataError(
                f"{split} has labels that train lacks: {listed(sorted(set(unknown)))} "
                f"({_rows(len(unknown))}). Add such rows to train, remove them from {split}, "
                "or correct their spelling (case counts)."
            )
    return tuple(sorted(classes))


def refuse(
    split: str, column: str, values: Sequence[object], fault: str, bad: Callable[[object], bool]
) -> None:
    """Raise a DataError that names the rows whose value is bad, and not the value.

    Args:
        split: The split, for the message.
        column: The column, for the message.
        values: One a row.
        fault: What is wrong with a bad one, in words.
        bad: Says which are.
    """
    rows = [number for number, value in enumerate(values, start=1) if bad(value)]
    if rows:
        raise DataError(
            f"{split}: `{column}` {fault} in {_rows(len(rows))} (row {listed(rows)}; the first "
            "row after the header is 1). Correct or remove these rows."
        )


def _is_blank(value: object) -> bool:
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    return missing or (isinstance(value, Row) and not value.strip())


def _rows(count: int) -> str:
    return f"{count} row" if count == 1 else f"{count} rows"
