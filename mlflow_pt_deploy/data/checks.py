"""What must hold before rows may teach or judge a model, whatever source they come from.

Knows column names, rows and string labels; knows no file format and does not cut anything.
A message names row numbers and labels, never the text of a row: that is the user's data.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral

from mlflow_pt_deploy.errors import DataError

Pairs = tuple[Sequence[object], Sequence[object]]
"""Texts and labels of one split as they were read, one of each a row."""

Cleaned = tuple[tuple[str, ...], tuple[str, ...]]
"""Texts and labels of one split after the checks."""

IMAGES_LATER = (
    "Images are not supported yet; give text instead, in columns `text` and `label`, "
    "or try --data catalog."
)

_SHOWN = 5
_NAME = re.compile(r"[A-Za-z_][\w.-]{0,29}")


def listed(items: Iterable[object]) -> str:
    """The first few items for a message: ``a, b, c, d, e and 7 more``."""
    everything = [str(item) for item in items]
    more = len(everything) - _SHOWN
    return ", ".join(everything[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def check_columns(where: str, columns: Sequence[str]) -> None:
    """Hold a table to the columns `text` and `label`.

    Args:
        where: The split or file, as the message shall name it.
        columns: Names of the columns that the table has.

    Raises:
        DataError: A column is missing, or the rows are images.
    """
    missing = [name for name in ("text", "label") if name not in columns]
    if not missing:
        return
    if "text" in missing and "image" in columns:
        raise DataError(f"{where} has a column `image` and no `text`. {IMAGES_LATER}")
    wanted = " and ".join(f"`{name}`" for name in missing)
    # Without a header the "names" are the first row itself, which no message may show.
    if all(_NAME.fullmatch(name) for name in columns):
        found = f"it has {listed(columns)}"
    else:
        found = "its first line does not look like a header"
    raise DataError(
        f"{where} has no column {wanted}; {found}. "
        "Name the columns `text` and `label` in the first line, with a comma between."
    )


def check_rows(split: str, pairs: Pairs) -> Cleaned:
    """Check one split and bring its labels to strings; texts stay as they are.

    Labels may be strings, whose outer whitespace goes, or whole numbers.

    Raises:
        DataError: No rows; or a text or label that is missing, blank or of another type.
    """
    texts, labels = pairs
    if not len(texts):
        raise DataError(f"{split} has no rows. Add rows, or leave {split} out if it is not train.")
    _refuse(split, "text", texts, "is missing or blank", _is_blank)
    _refuse(split, "label", labels, "is missing or blank", _is_blank)
    _refuse(split, "text", texts, "is not a string", lambda value: not isinstance(value, str))
    _refuse(
        split,
        "label",
        labels,
        "is neither a string nor a whole number",
        lambda value: not isinstance(value, str | Integral),
    )
    return tuple(map(str, texts)), tuple(str(label).strip() for label in labels)


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


def _refuse(
    split: str, column: str, values: Sequence[object], fault: str, bad: Callable[[object], bool]
) -> None:
    rows = [number for number, value in enumerate(values, start=1) if bad(value)]
    if rows:
        raise DataError(
            f"{split}: `{column}` {fault} in {_rows(len(rows))} (row {listed(rows)}; the first "
            "row after the header is 1). Correct or remove these rows."
        )


def _is_blank(value: object) -> bool:
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    return missing or (isinstance(value, str) and not value.strip())


def _rows(count: int) -> str:
    return f"{count} row" if count == 1 else f"{count} rows"
