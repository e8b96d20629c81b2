"""What must hold before rows may teach or judge a model, whatever source they come from.

Knows column names, rows and string labels; knows no file format and does not cut anything.
A message names columns, row numbers and labels, never the content of a row: that is the user's
data.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from mlflow_pt_deploy.columns import INPUTS, LABEL, normal, other_task, paired, renames
from mlflow_pt_deploy.data.labels import (
    check_kind,
    counted,
    is_missing,
    is_no_text,
    listed,
    read_labels,
)
from mlflow_pt_deploy.errors import DataError

Pairs = tuple[Sequence[object], Sequence[object]]
"""Inputs and labels of one split as they were read, one of each a row."""

Row = str | bytes
"""One raw input: a text, or an encoded image (PNG, JPEG, ...)."""

Cleaned = tuple[tuple[Row, ...], tuple[str, ...]]
"""Inputs and labels of one split after the checks."""

COLUMNS = {"text": str, "image": bytes}
"""What the input column may be called, and what a row of it is."""

_NAME = re.compile(r"\s*[^\W\d][\w.-]{0,29}\s*|")
_LABELS = re.compile("(label|class|category|tag|intent)_?([0-9]+|a|b|c)")
_FLAGS = ({"0", "1"}, {"true", "false"}, {"0.0", "1.0"})


def check_columns(where: str, columns: Sequence[str], *, header: bool = False) -> str:
    """Hold a table to a column of inputs, `text` or `image`, and to the column `label`.

    Args:
        where: The split or file, as the message shall name it.
        columns: Names of the columns that the table has.
        header: Whether they are the first line of a file, which may be a row instead.

    Returns:
        The name of the input column; ``text`` where there are both.

    Raises:
        DataError: A column is missing or there twice, or the table is for another task.
    """
    refuse_pairs(where, columns)
    twice = [name for name in (*INPUTS, LABEL) if list(columns).count(name) > 1]
    if twice:
        raise DataError(f"{where} has two columns `{twice[0]}`. Remove or rename one of them.")
    given = next((name for name in INPUTS if name in columns), None)
    missing = [name for name in (given or "text", LABEL) if name not in columns]
    if given and not missing:
        return given
    raise DataError(_missing(where, columns, missing, header=header))


def refuse_pairs(where: str, columns: Sequence[str]) -> None:
    """Refuse a table with several texts or images a row.

    Raises:
        DataError: There are; names the columns.
    """
    kind, names = paired(columns)
    if names:
        found = " and ".join(f"`{name}`" for name in names)
        raise DataError(
            f"{where} has more than one {kind} a row ({found}); tasks on pairs (inference, "
            f"similarity, reranking, question answering) are not supported, one {kind} a row is. "
            f"Keep one column, named `{kind}`, or join them into it and remove the others."
        )


def _missing(where: str, columns: Sequence[str], missing: Sequence[str], *, header: bool) -> str:
    wanted = " and ".join(f"`{name}`" for name in missing)
    # Without a header the "names" are the first row itself, which no message may show.
    if header and not all(_NAME.fullmatch(name) for name in columns):
        return (
            f"{where} has no column {wanted}; its first line does not look like a header. Name the "
            "columns `text` (or `image`) and `label` in the first line, with a comma between."
        )
    fault = f"{where} has no column {wanted}; it has {listed(name for name in columns if name)}"
    if len(several := [name for name in columns if _LABELS.fullmatch(normal(name))]) > 1:
        return (
            f"{where} has several columns of labels ({listed(several)}); several labels a row are "
            "not supported. Name the main one `label`."
        )
    meant, task = renames(columns, missing), other_task(columns)
    if task and len(meant) < len(missing):
        return (
            f"{fault}. This looks like data for {task}, which is not supported; classification of "
            "one text or one image a row is. Where it is that, name the columns `text` (or "
            "`image`) and `label`."
        )
    if meant:
        cure = " and ".join(meant)
        return f"{fault}. {cure[0].upper()}{cure[1:]} if that is what it holds."
    return f"{fault}. Name the columns `text` (or `image`) and `label`."


def refuse_flags(where: str, columns: Mapping[str, Sequence[object]]) -> None:
    """Refuse one column of 0 and 1 for each label, where no column `label` is.

    Args:
        where: The split or file, as the message shall name it.
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
            f"{where} has no column `label` but several of 0 and 1 ({listed(flags)}), as data with "
            "several labels a row has (multi-label classification), which is not supported. Write "
            "the main label of each row into one column `label`."
        )


def check_rows(split: str, pairs: Pairs, column: str = "text") -> Cleaned:
    """Check one split and bring its labels to strings; inputs stay as they are.

    Labels may be strings, whose outer whitespace goes, or whole numbers; see `read_labels`.

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
    if column == "text" and all(map(is_no_text, rows)):
        raise DataError(
            f"{split}: `text` holds numbers only, or dates or bytes. Check that the columns are "
            "not mixed up; tables of numbers are not supported, texts are."
        )
    refuse(split, column, rows, f"is not {words[column]}", lambda v: not isinstance(v, kind))
    return tuple(map(kind, rows)), read_labels(split, labels)


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
    check_kind(labels["train"])
    for split, names in labels.items():
        unknown = [name for name in names if name not in classes]
        if unknown:
            raise DataError(
                f"{split} has labels that train lacks: {listed(sorted(set(unknown)))} "
                f"({counted(len(unknown))}). Add such rows to train, remove them from {split}, "
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
            f"{split}: `{column}` {fault} in {counted(len(rows))} (row {listed(rows)}; the first "
            "row after the header is 1). Correct or remove these rows."
        )


def _is_blank(value: object) -> bool:
    return is_missing(value) or (isinstance(value, Row) and not value.strip())
