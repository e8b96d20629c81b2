"""Check columns, rows and labels of any data source.

Messages contain column names, row numbers and labels, never the content of a row (user data).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from mlflow_pt_deploy.data.columns import (
    INPUTS,
    LABEL,
    find_pair_columns,
    guess_task,
    normalize_name,
    suggest_renames,
)
from mlflow_pt_deploy.data.label_kinds import (
    check_kind,
    format_list,
    format_row_count,
    is_missing,
    is_non_text,
    read_labels,
)
from mlflow_pt_deploy.errors import DataError

Pairs = tuple[Sequence[object], Sequence[object]]
"""Inputs and labels of one split before the checks, one of each per row."""

Row = str | bytes
"""One raw input: a text, or an encoded image (PNG, JPEG, ...)."""

Cleaned = tuple[tuple[Row, ...], tuple[str, ...]]
"""Inputs and labels of one split after the checks."""

COLUMNS = {"text": str, "image": bytes}
"""Names of input columns, and the type of their rows."""

_NAME = re.compile(r"\s*[^\W\d][\w.-]{0,29}\s*|")
_LABELS = re.compile("(label|class|category|tag|intent)_?([0-9]+|a|b|c)")
_FLAGS = ({"0", "1"}, {"true", "false"}, {"0.0", "1.0"})


def check_columns(where: str, columns: Sequence[str], *, header: bool = False) -> str:
    """Check that a table has an input column, `text` or `image`, and the column `label`.

    Args:
        where: The split or file, for error messages.
        columns: Column names of the table.
        header: Whether the names are the first line of a file, which may be a row instead.

    Returns:
        Name of the input column; ``text`` if both exist.

    Raises:
        DataError: A column is missing or duplicated, or the table is for another task.
    """
    reject_pair_columns(where, columns)
    twice = [name for name in (*INPUTS, LABEL) if list(columns).count(name) > 1]
    if twice:
        raise DataError(f"{where} has two columns `{twice[0]}`. Remove or rename one of them.")
    given = next((name for name in INPUTS if name in columns), None)
    missing = [name for name in (given or "text", LABEL) if name not in columns]
    if given and not missing:
        return given
    raise DataError(_missing(where, columns, missing, header=header))


def reject_pair_columns(where: str, columns: Sequence[str]) -> None:
    """Reject a table with several texts or images per row.

    Raises:
        DataError: The table has several input columns.
    """
    kind, names = find_pair_columns(columns)
    if names:
        found = " and ".join(f"`{name}`" for name in names)
        raise DataError(
            f"{where} has more than one {kind} per row ({found}); tasks on pairs (inference, "
            f"similarity, reranking, question answering) are not supported. Keep one {kind} per "
            f"row in a column `{kind}`, or concatenate the columns into it."
        )


def _missing(where: str, columns: Sequence[str], missing: Sequence[str], *, header: bool) -> str:
    wanted = " and ".join(f"`{name}`" for name in missing)
    # Without a header the "names" are the first row, which must not appear in a message.
    if header and not all(_NAME.fullmatch(name) for name in columns):
        return (
            f"{where} has no column {wanted}; its first line does not look like a header. Name the "
            "columns `text` (or `image`) and `label` in the first line, separated by a comma."
        )
    existing = format_list(name for name in columns if name)
    problem = f"{where} has no column {wanted}; it has {existing}"
    if len(several := [name for name in columns if _LABELS.fullmatch(normalize_name(name))]) > 1:
        return (
            f"{where} has several label columns ({format_list(several)}); several labels per row "
            "are not supported. Rename the main one to `label`."
        )
    suggested, task = suggest_renames(columns, missing), guess_task(columns)
    if task and len(suggested) < len(missing):
        return (
            f"{problem}. This looks like data for {task}, which is not supported. To classify one "
            "text or one image per row, name the columns `text` (or `image`) and `label`."
        )
    if suggested:
        remedy = " and ".join(suggested)
        return f"{problem}. {remedy[0].upper()}{remedy[1:]} if that is its content."
    return f"{problem}. Name the columns `text` (or `image`) and `label`."


def reject_indicator_columns(where: str, columns: Mapping[str, Sequence[object]]) -> None:
    """Reject a table without `label` that has a 0/1 column per label.

    Args:
        where: The split or file, for error messages.
        columns: The first rows of all columns.

    Raises:
        DataError: There are two or more such columns.
    """
    if LABEL in columns:
        return
    flags = [
        name
        for name, cells in columns.items()
        if cells and any({str(cell).strip().lower() for cell in cells} <= two for two in _FLAGS)
    ]
    if len(flags) > 1:
        raise DataError(
            f"{where} has no column `label` but several columns of 0 and 1 ({format_list(flags)}), "
            "like data with several labels per row (multi-label classification), which is not "
            "supported. Write the main label of each row into one column `label`."
        )


def check_rows(split: str, pairs: Pairs, column: str = "text") -> Cleaned:
    """Check one split and convert its labels to strings; inputs are unchanged.

    Labels are strings or whole numbers, see `read_labels`.

    Args:
        split: Name of the split, for error messages.
        pairs: Inputs and labels before the checks.
        column: One of `COLUMNS`.

    Raises:
        DataError: The split has no rows, or an input or label is missing, blank or of a wrong type.
    """
    rows, labels = pairs
    if not len(rows):
        raise DataError(f"{split} has no rows. Add rows, or omit {split} if it is not train.")
    kind, expected = COLUMNS[column], {"text": "a string", "image": "the bytes of an image file"}
    reject_rows(split, column, rows, "is missing or blank", _is_blank)
    reject_rows(split, "label", labels, "is missing or blank", _is_blank)
    if column == "text" and all(map(is_non_text, rows)):
        raise DataError(
            f"{split}: `text` contains only numbers, dates or bytes, which are not supported. "
            "Check that the columns are not swapped."
        )
    reject_rows(
        split, column, rows, f"is not {expected[column]}", lambda v: not isinstance(v, kind)
    )
    return tuple(map(kind, rows)), read_labels(split, labels)


def check_labels(labels: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Determine the classes, which are the labels of train.

    Args:
        labels: Labels of each split; `train` always exists.

    Returns:
        The classes, sorted.

    Raises:
        DataError: Train has only one class, or another split has labels that train lacks.
    """
    classes = set(labels["train"])
    if len(classes) < 2:
        raise DataError(
            f"train has only one label ({format_list(classes)}); a classifier needs two or more. "
            "Add rows with other labels."
        )
    check_kind(labels["train"])
    for split, names in labels.items():
        unknown = [name for name in names if name not in classes]
        if unknown:
            raise DataError(
                f"{split} has labels that train lacks: {format_list(sorted(set(unknown)))} "
                f"({format_row_count(len(unknown))}). Add such rows to train, remove them from "
                f"{split}, or correct their spelling (labels are case-sensitive)."
            )
    return tuple(sorted(classes))


def reject_rows(
    split: str, column: str, values: Sequence[object], fault: str, bad: Callable[[object], bool]
) -> None:
    """Reject rows with bad values; the message contains row numbers, not values.

    Args:
        split: Name of the split, for the message.
        column: Name of the column, for the message.
        values: One value per row.
        fault: The problem, for the message, e.g. ``is missing or blank``.
        bad: Whether a value is bad.

    Raises:
        DataError: At least one value is bad.
    """
    rows = [number for number, value in enumerate(values, start=1) if bad(value)]
    if rows:
        raise DataError(
            f"{split}: `{column}` {fault} in {format_row_count(len(rows))} (row "
            f"{format_list(rows)}; the first row after the header is 1). Correct or remove these "
            "rows."
        )


def _is_blank(value: object) -> bool:
    return is_missing(value) or (isinstance(value, Row) and not value.strip())
