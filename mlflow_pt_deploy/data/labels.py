"""What kind of labels a split has: one class a row goes on, everything else is refused in words.

Scores, several labels a row and one label for each row are other tasks, or mistakes; they look like
classes once they are strings, so they are told apart before. CSV has strings only and Parquet has
types: both come out alike here. Messages name labels and row numbers, never a row's input.
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
"""Separators that names have too: what stands between must be labels of other rows."""
_SHOWN = 5
_MANY = 10
_MULTI_LABEL = (
    "one row has one label here, and several labels a row (multi-label classification) are not "
    "supported. Keep the main label of each row"
)


def listed(items: Iterable[object]) -> str:
    """The first few items for a message: ``a, b, c, d, e and 7 more``."""
    everything = [_short(str(item)) for item in items]
    more = len(everything) - _SHOWN
    return ", ".join(everything[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def counted(count: int) -> str:
    """``1 row`` or ``7 rows``."""
    return f"{count} row" if count == 1 else f"{count} rows"


def read_labels(split: str, values: Sequence[object]) -> tuple[str, ...]:
    """Labels as strings, without outer whitespace.

    Whole numbers become their digits however they are written: a Parquet column of integers with a
    gap becomes floats in pandas, and ``3.0`` in the CSV that pandas writes of it.

    Args:
        split: Its name, for the message.
        values: What a file holds, one a row, none of them missing.

    Raises:
        DataError: A row has several labels, or the labels are scores or of another type.
    """
    several = [at for at, value in enumerate(values, 1) if _is_collection(value)]
    if several:
        raise DataError(
            f"{split}: `label` holds a list in {counted(len(several))} (row {listed(several)}); "
            f"{_MULTI_LABEL}, as a string or a whole number."
        )
    # Dates and bytes have a type in Parquet, and pandas writes them to CSV in these forms.
    other = [at for at, value in enumerate(values, 1) if not isinstance(value, str | _Numeric)]
    for form in (_DATE, _BYTES):
        if all(isinstance(value, str) and form.fullmatch(value.strip()) for value in values):
            other = [*range(1, len(values) + 1)]
    if other:
        raise DataError(
            f"{split}: `label` is neither a string nor a whole number in {counted(len(other))} "
            f"(row {listed(other)}; the first row after the header is 1). Correct or remove these "
            "rows; dates and bytes are no classes."
        )
    typed = [value for value in values if isinstance(value, _Numeric)]
    _refuse_scores(split, [str(value) for value in typed if not float(value).is_integer()])
    texts = [value.strip() if isinstance(value, str) else str(value) for value in values]
    return tuple(_whole(split, texts))


_Numeric = Real | Decimal


def _is_collection(value: object) -> bool:
    if isinstance(value, str | bytes):
        return False
    return isinstance(value, Sequence | Mapping | set) or getattr(value, "ndim", 0) > 0


def _whole(split: str, labels: Sequence[str]) -> Sequence[str]:
    """Labels that are all numbers as whole ones; others as they are."""
    kinds = set(labels)
    if not all(map(_NUMBER.fullmatch, kinds)) or all(map(_is_integer, kinds)):
        return labels
    values = {label: float(label) for label in kinds}
    _refuse_scores(split, sorted(label for label in kinds if not values[label].is_integer()))
    # The digits of a whole number stay as they are, e.g. 007.
    return [label if _is_integer(label) else str(int(values[label])) for label in labels]


def _refuse_scores(split: str, decimals: Sequence[str]) -> None:
    if decimals:
        raise DataError(
            f"{split}: `label` holds decimal numbers ({listed(dict.fromkeys(decimals))}). They "
            "look like scores; predicting a number (regression) is not supported, choosing a class "
            "is. Give each row a class (a word or a whole number), e.g. by cutting the scores into "
            "ranges."
        )


def _is_integer(label: str) -> bool:
    return label.removeprefix("-").isdecimal()


def check_kind(labels: Sequence[str]) -> None:
    """Refuse classes that are not one class a row.

    Args:
        labels: Those of train, one a row, as `read_labels` gave them.

    Raises:
        DataError: They are lists in one string, the same number in several spellings, or nearly
            each row has one of its own.
    """
    counts = Counter(labels)
    if all(map(_COMMAS.fullmatch, counts)) and (commas := [at for at in counts if "," in at]):
        raise DataError(
            f"train: `label` holds numbers with commas ({listed(commas)}). Scores (regression) and "
            "several labels a row are not supported; give each row one class."
        )
    if composite := _composite(counts):
        raise DataError(
            f"train: `label` holds several labels in one string ({listed(composite)}); "
            f"{_MULTI_LABEL}. Where this is one name, write it without the separator."
        )
    spelt: dict[float, list[str]] = {}
    for label in counts:
        if _NUMBER.fullmatch(label):
            spelt.setdefault(float(label), []).append(label)
    if twice := next((names for names in spelt.values() if len(names) > 1), None):
        raise DataError(
            f"train: the labels {listed(twice)} are one number in several spellings. Write it in "
            "one way in all rows."
        )
    once = sum(count == 1 for count in counts.values())
    if len(counts) >= _MANY and 2 * once > len(labels):
        raise DataError(
            f"train: `label` has {len(counts)} different values in {counted(len(labels))}, most of "
            f"them once ({listed(sorted(counts))}): these look like ids, texts or scores and not "
            "like classes. Give each class several rows; regression and ranking are not supported."
        )


def _composite(counts: Mapping[str, int]) -> list[str]:
    """Labels that are lists of labels: ``a|b`` beside ``a`` and ``b``, ``["a", "b"]``."""
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


def notes(labels: Sequence[str]) -> list[str]:
    """What a reader should know of the classes of train.

    Args:
        labels: Those of train, one a row.
    """
    classes, said = sorted(set(labels)), []
    folded: dict[str, list[str]] = {}
    for name in classes:
        folded.setdefault(unicodedata.normalize("NFKC", name).casefold(), []).append(name)
    alike = [" and ".join(names) for names in folded.values() if len(names) > 1]
    if alike:
        said.append(f"labels that differ in case or spelling only are two classes: {listed(alike)}")
    if "O" in classes and all(_TAG.fullmatch(name) for name in classes):
        said.append(
            "the labels look like tags of single words (token classification); here each row is "
            "one text with one label"
        )
    if len(classes) > 20 and all(_is_integer(name) for name in classes):
        numbers = sorted(int(name) for name in classes)
        if numbers[-1] - numbers[0] >= len(numbers):
            said.append(
                f"the labels are {len(numbers)} whole numbers from {numbers[0]} to {numbers[-1]}; "
                "each is a class of its own, and that 3 is nearer to 4 than to 9 is not learned"
            )
    return said


def is_missing(value: object) -> bool:
    """Whether a cell holds nothing: None, NaN, pandas' NA and NaT."""
    if value is None:
        return True
    if isinstance(value, float | Decimal):
        return math.isnan(value)
    return type(value).__name__ in ("NAType", "NaTType")


def is_no_text(value: object) -> bool:
    """Whether a cell is a number, a date or bytes, typed or written out."""
    forms = (_NUMBER, _DATE, _BYTES)
    return isinstance(value, _Numeric) or (
        isinstance(value, str) and any(form.fullmatch(value.strip()) for form in forms)
    )
