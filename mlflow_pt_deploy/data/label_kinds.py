"""Validate labels: accept one class per row, reject labels of other tasks.

Scores, several labels per row and unique labels indicate another task or a mistake. They look like
classes once they are strings, so they are detected first. CSV (strings) and Parquet (typed) give
the same result. Messages contain labels and row numbers, never the input of a row.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from numbers import Real

from mlflow_pt_deploy.errors import DataError

_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")
_COMMAS = re.compile(r"[+-]?\d+(,\d+)*")
_NUMBERS_LISTED = re.compile(r"\d+([ \t]+\d+)*")
_LIST = re.compile(r"\[.*\]|\(.*\)|\{.*\}", re.DOTALL)
_DATE = re.compile(r"\d{4}-\d\d-\d\d([ T]\d\d:\d\d(:\d\d(\.\d+)?)?(Z|[+-]\d\d:?\d\d)?)?")
_BYTES = re.compile(r"b(['\"]).*\1", re.DOTALL)
_TAG = re.compile("O|[BIESLU]-.+")
_SEPARATORS = ("|", ";", ",", "+", "&")
_DOUBTFUL = ("/", " ")
"""Separators that class names contain too: every part must also be a label of its own."""
_MAX_LISTED = 5
_MIN_UNIQUE = 10
_MULTI_LABEL = (
    "several labels per row (multi-label classification) are not supported. Keep the main label of "
    "each row"
)


def format_list(items: Iterable[object]) -> str:
    """Format the first items for a message: ``a, b, c, d, e and 7 more``."""
    texts = [_short(str(item)) for item in items]
    more = len(texts) - _MAX_LISTED
    return ", ".join(texts[:_MAX_LISTED]) + (f" and {more} more" if more > 0 else "")


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def format_row_count(count: int) -> str:
    """Format a number of rows: ``1 row`` or ``7 rows``."""
    return f"{count} row" if count == 1 else f"{count} rows"


def read_labels(split: str, values: Sequence[object]) -> tuple[str, ...]:
    """Convert labels to strings without outer whitespace.

    Whole numbers become integers in any notation: pandas converts a Parquet column of integers
    with missing values to floats, and writes ``3.0`` to CSV.

    Args:
        split: Name of the split, for error messages.
        values: One label per row, without missing values.

    Raises:
        DataError: A row has several labels, or the labels are scores or of an unsupported type.
    """
    several = [at for at, value in enumerate(values, 1) if _is_collection(value)]
    if several:
        raise DataError(
            f"{split}: `label` contains a list in {format_row_count(len(several))} (row "
            f"{format_list(several)}); {_MULTI_LABEL}, as a string or a whole number."
        )
    # Dates and bytes are typed in Parquet; pandas writes them to CSV in these forms.
    other = [at for at, value in enumerate(values, 1) if not isinstance(value, str | _Numeric)]
    for form in (_DATE, _BYTES):
        if all(isinstance(value, str) and form.fullmatch(value.strip()) for value in values):
            other = [*range(1, len(values) + 1)]
    if other:
        raise DataError(
            f"{split}: `label` is neither a string nor a whole number in "
            f"{format_row_count(len(other))} (row {format_list(other)}; the first row after the "
            "header is 1). Correct or remove these rows; dates and bytes are not classes."
        )
    typed = [value for value in values if isinstance(value, _Numeric)]
    _reject_scores(split, [str(value) for value in typed if not float(value).is_integer()])
    texts = [value.strip() if isinstance(value, str) else str(value) for value in values]
    return tuple(_normalize_numbers(split, texts))


_Numeric = Real | Decimal


def _is_collection(value: object) -> bool:
    if isinstance(value, str | bytes):
        return False
    return isinstance(value, Sequence | Mapping | set) or getattr(value, "ndim", 0) > 0


def _normalize_numbers(split: str, labels: Sequence[str]) -> Sequence[str]:
    """Convert labels to integers if all are numbers; else return them unchanged."""
    kinds = set(labels)
    if not all(map(_NUMBER.fullmatch, kinds)) or all(map(_is_integer, kinds)):
        return labels
    values = {label: float(label) for label in kinds}
    _reject_scores(split, sorted(label for label in kinds if not values[label].is_integer()))
    # Integers keep their digits, e.g. 007.
    return [label if _is_integer(label) else str(int(values[label])) for label in labels]


def _reject_scores(split: str, decimals: Sequence[str]) -> None:
    if decimals:
        raise DataError(
            f"{split}: `label` contains decimal numbers ({format_list(dict.fromkeys(decimals))}), "
            "which look like scores; predicting a number (regression) is not supported. Give each "
            "row a class (a word or a whole number), e.g. by binning the scores."
        )


def _is_integer(label: str) -> bool:
    return label.removeprefix("-").isdecimal()


def check_kind(labels: Sequence[str]) -> None:
    """Reject labels that are not one class per row.

    Args:
        labels: Labels of train, one per row, from `read_labels`.

    Raises:
        DataError: Labels are lists in a string, one number in several notations, or mostly unique.
    """
    counts = Counter(labels)
    if all(map(_COMMAS.fullmatch, counts)) and (commas := [at for at in counts if "," in at]):
        raise DataError(
            f"train: `label` contains numbers with commas ({format_list(commas)}). Scores "
            "(regression) and several labels per row are not supported; give each row one class."
        )
    if composite := _composite(counts):
        raise DataError(
            f"train: `label` contains several labels in one string ({format_list(composite)}); "
            f"{_MULTI_LABEL}. If this is one name, write it without the separator."
        )
    notations: dict[float, list[str]] = {}
    for label in counts:
        if _NUMBER.fullmatch(label):
            notations.setdefault(float(label), []).append(label)
    if twice := next((names for names in notations.values() if len(names) > 1), None):
        raise DataError(
            f"train: the labels {format_list(twice)} are one number in several notations. Use the "
            "same notation in all rows."
        )
    once = sum(count == 1 for count in counts.values())
    if len(counts) >= _MIN_UNIQUE and 2 * once > len(labels):
        raise DataError(
            f"train: `label` has {len(counts)} different values in "
            f"{format_row_count(len(labels))}, and most occur once "
            f"({format_list(sorted(counts))}): they look like ids, texts or scores, not classes. "
            "Give each class several rows; regression and ranking are not supported."
        )


def _composite(counts: Mapping[str, int]) -> list[str]:
    """Find labels that are lists of labels: ``a|b`` if ``a`` and ``b`` exist, ``["a", "b"]``."""
    listlike = [label for label in counts if _LIST.fullmatch(label)]
    if len(listlike) > len(counts) / 2:
        return listlike
    if all(_NUMBERS_LISTED.fullmatch(label) for label in counts):
        return [label for label in counts if len(label.split()) > 1]
    for separator in (*_SEPARATORS, *_DOUBTFUL):
        joined = [label for label in counts if separator in label]
        seen = Counter(part for label in counts for part in _parts(label, separator))
        known = counts if separator in _DOUBTFUL else {part for part in seen if seen[part] > 1}
        lists = [
            label
            for label in joined
            if len(parts := _parts(label, separator)) > 1 and all(part in known for part in parts)
        ]
        if lists and 2 * len(lists) >= len(joined):
            return lists
    return []


def _parts(label: str, separator: str) -> set[str]:
    return {part.strip() for part in label.split(separator)} - {""}


def label_notes(labels: Sequence[str]) -> list[str]:
    """Describe unusual properties of the classes of train.

    Args:
        labels: Labels of train, one per row.
    """
    classes, notes = sorted(set(labels)), []
    folded: dict[str, list[str]] = {}
    for name in classes:
        folded.setdefault(unicodedata.normalize("NFKC", name).casefold(), []).append(name)
    alike = [" and ".join(names) for names in folded.values() if len(names) > 1]
    if alike:
        notes.append(
            "labels that differ only in case or spelling are different classes: "
            f"{format_list(alike)}"
        )
    if "O" in classes and all(_TAG.fullmatch(name) for name in classes):
        notes.append(
            "the labels look like tags of single words (token classification); each row is used as "
            "one text with one label"
        )
    if len(classes) > 20 and all(_is_integer(name) for name in classes):
        numbers = sorted(int(name) for name in classes)
        if numbers[-1] - numbers[0] >= len(numbers):
            notes.append(
                f"the labels are {len(numbers)} whole numbers from {numbers[0]} to {numbers[-1]}; "
                "each is a separate class, and their numerical order is not learned"
            )
    return notes


def is_missing(value: object) -> bool:
    """Whether a cell is missing: None, NaN, pandas' NA or NaT."""
    if value is None:
        return True
    if isinstance(value, float | Decimal):
        return math.isnan(value)
    return type(value).__name__ in ("NAType", "NaTType")


def is_non_text(value: object) -> bool:
    """Whether a cell is a number, a date or bytes, typed or as a string."""
    forms = (_NUMBER, _DATE, _BYTES)
    return isinstance(value, _Numeric) or (
        isinstance(value, str) and any(form.fullmatch(value.strip()) for form in forms)
    )
