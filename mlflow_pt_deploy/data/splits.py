"""The one shape that all data takes before anything learns from it: `Splits`.

Knows rows, labels and how to check and cut them; knows no file format and no model.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from mlflow_pt_deploy.data import labels as label_kinds
from mlflow_pt_deploy.data.checks import Pairs, Row, check_labels, check_rows
from mlflow_pt_deploy.data.labels import listed
from mlflow_pt_deploy.errors import DataError

Targets = npt.NDArray[np.int64]

_CUTS = {"test": (0.2, 5000), "validation": (0.1, 2000)}
"""Share of train and most rows for a split that was not given, in the order of cutting."""


@dataclass(frozen=True)
class Split:
    """Rows with their targets.

    Attributes:
        rows: One raw input a row: a text, or the bytes of an image file.
        targets: int64 (rows,), an index into `Splits.labels` for each row.
    """

    rows: tuple[Row, ...]
    targets: Targets

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def digest(self) -> str:
        """Eight hexadecimal digits that change when a row or a target does."""
        sha = hashlib.sha256()
        for row in self.rows:
            data = row.encode("utf-8", "surrogatepass") if isinstance(row, str) else row
            sha.update(len(data).to_bytes(8, "little") + data)
        sha.update(np.ascontiguousarray(self.targets, dtype="<i8").tobytes())
        return sha.hexdigest()[:8]


@dataclass(frozen=True)
class Splits:
    """A data set: `train` teaches, `validation` decides, `test` is reported once.

    Attributes:
        name: Short name for tables and for MLflow's dataset, e.g. ``banking77``.
        source: What the user gave as ``--data``.
        column: The input column, ``text`` or ``image``.
        labels: Names of the classes, sorted; targets are indices into it.
        synthetic: True where the rows were generated, not collected.
        notes: What a reader of the results should know (a label seen once, rows cut off, ...).
    """

    name: str
    source: str
    labels: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    column: str = "text"
    synthetic: bool = False
    notes: Sequence[str] = field(default=())


def build_splits(
    given: Mapping[str, Pairs],
    *,
    name: str,
    source: str,
    column: str = "text",
    seed: int = 0,
    synthetic: bool = False,
    notes: Sequence[str] = (),
) -> Splits:
    """Check what a source has read, and cut from train what is missing.

    Validation is cut as 10 % of train (at most 2000 rows), test as 20 % (at most 5000) before it.
    Cuts are stratified and seeded, and leave at least one row of each class in train.

    Args:
        given: Inputs and labels of `train` and, where they exist, of `validation` and `test`.
        name: Short name of the data set.
        source: What the user gave as ``--data``.
        column: What the inputs are, ``text`` or ``image``.
        seed: Decides which rows are cut.
        synthetic: True where the rows were generated.
        notes: What the source itself has to say.

    Raises:
        DataError: Rows or labels that cannot be used; the message names them and the cure.
    """
    cleaned = {split: check_rows(split, pairs, column) for split, pairs in given.items()}
    classes = check_labels({split: labels for split, (_, labels) in cleaned.items()})
    index = {label: number for number, label in enumerate(classes)}
    parts = {
        split: Split(rows, np.array([index[label] for label in labels], dtype=np.int64))
        for split, (rows, labels) in cleaned.items()
    }
    said = [*notes, *label_kinds.notes(cleaned["train"][1]), *_rare_labels(classes, parts["train"])]
    said += _contradictions(parts["train"])
    for split, (share, most) in _CUTS.items():
        if split not in parts:
            size = min(most, max(1, round(share * len(parts["train"]))))
            parts["train"], parts[split] = _cut(parts["train"], split, size, seed)
            cut = len(parts[split])
            said.append(f"no {split} split was given: {cut} rows were cut from train, seed {seed}")
    said += _overlap(parts)
    return Splits(
        name=name,
        source=source,
        labels=classes,
        train=parts["train"],
        validation=parts["validation"],
        test=parts["test"],
        column=column,
        synthetic=synthetic,
        notes=tuple(said),
    )


def limit_splits(splits: Splits, limit: int, seed: int) -> Splits:
    """Keep at most `limit` rows of each split, stratified and seeded; train keeps every class.

    Raises:
        DataError: The limit leaves no row for some class in train.
    """
    classes = len(splits.labels)
    if limit < classes:
        raise DataError(
            f"A limit of {limit} rows cannot keep one train row for each of {classes} labels. "
            f"Use a limit of {classes} or more, or 0 for all rows."
        )
    cut = []
    for split in ("train", "validation", "test"):
        part: Split = getattr(splits, split)
        if len(part) > limit:
            cut.append(f"{split} {limit} of {len(part)}")
    if not cut:
        return splits
    note = f"limited to {limit} rows a split for a quick trial ({', '.join(cut)}), seed {seed}"
    return replace(
        splits,
        train=_sample(splits.train, limit, seed, every_class=True),
        validation=_sample(splits.validation, limit, seed),
        test=_sample(splits.test, limit, seed),
        notes=(*splits.notes, note),
    )


def _stratified_order(targets: Targets, seed: int) -> list[int]:
    """Row indices in such an order that every first part has the classes in proportion."""
    shuffled = list(range(len(targets)))
    random.Random(seed).shuffle(shuffled)
    by_class: dict[int, list[int]] = {}
    for row in shuffled:
        by_class.setdefault(int(targets[row]), []).append(row)
    # The k-th of a class's n rows stands at (k + 0.5) / n of the way.
    place = {row: (k + 0.5) / len(rows) for rows in by_class.values() for k, row in enumerate(rows)}
    return sorted(shuffled, key=place.__getitem__)


def _one_of_each(targets: Targets, order: Iterable[int]) -> set[int]:
    """The first row of each class in the given order."""
    first: dict[int, int] = {}
    for row in order:
        first.setdefault(int(targets[row]), row)
    return set(first.values())


def _cut(train: Split, split: str, size: int, seed: int) -> tuple[Split, Split]:
    order = _stratified_order(train.targets, seed)
    stays = _one_of_each(train.targets, reversed(order))
    cut = [row for row in order if row not in stays][:size]
    if not cut:
        raise DataError(
            f"train is too small to cut a {split} split from it: no label is left with two rows. "
            f"Add rows, or give a {split} split."
        )
    gone = set(cut)
    return _take(train, (r for r in range(len(train)) if r not in gone)), _take(train, cut)


def _sample(split: Split, limit: int, seed: int, *, every_class: bool = False) -> Split:
    order = _stratified_order(split.targets, seed)
    if every_class:
        # `limit_splits` has made sure that one row of each class fits in.
        first = _one_of_each(split.targets, order)
        order.sort(key=lambda row: row not in first)
    return _take(split, order[:limit])


def _take(split: Split, chosen: Iterable[int]) -> Split:
    rows = sorted(chosen)
    return Split(tuple(split.rows[row] for row in rows), split.targets[rows])


def _rare_labels(classes: Sequence[str], train: Split) -> list[str]:
    counts = np.bincount(train.targets, minlength=len(classes))
    once = [label for label, count in zip(classes, counts, strict=True) if count == 1]
    if not once:
        return []
    return [f"{len(once)} of {len(classes)} labels occur once in train: {listed(once)}"]


def _contradictions(train: Split) -> list[str]:
    labels: dict[Row, set[int]] = {}
    for row, target in zip(train.rows, train.targets.tolist(), strict=True):
        labels.setdefault(row, set()).add(target)
    several = sum(len(targets) > 1 for targets in labels.values())
    if not several:
        return []
    return [
        f"{several} of {len(labels)} different inputs in train have more than one label, in rows "
        "of their own; a model answers with one (multi-label classification is not supported)"
    ]


def _overlap(parts: Mapping[str, Split]) -> list[str]:
    seen = {_folded(row) for split in ("train", "validation") for row in parts[split].rows}
    known = sum(_folded(row) in seen for row in parts["test"].rows)
    if not known:
        return []
    return [
        f"{known} of {len(parts['test'])} test rows also occur in train or validation (case "
        "ignored); they make test figures look better than they are"
    ]


def _folded(row: Row) -> Row:
    return row.casefold() if isinstance(row, str) else row


def align(splits: Splits, labels: Sequence[str]) -> Splits:
    """Number the targets as a model numbers its classes.

    Args:
        splits: Data whose labels the model knows, in any order.
        labels: Names of the model's classes, in the order of its logits.

    Raises:
        DataError: The data has labels that the model does not know.
    """
    if tuple(labels) == splits.labels:
        return splits
    if unknown := sorted(set(splits.labels) - set(labels)):
        raise DataError(
            f"the model does not know {len(unknown)} of the data's labels ({listed(unknown)}); it "
            f"knows {len(labels)} ({listed(sorted(labels))}). Rename the labels in the data, or "
            "set id2label in the model's config.json."
        )
    number = np.asarray([list(labels).index(label) for label in splits.labels], dtype=np.int64)

    def moved(split: Split) -> Split:
        return Split(split.rows, number[split.targets])

    return replace(
        splits,
        labels=tuple(labels),
        train=moved(splits.train),
        validation=moved(splits.validation),
        test=moved(splits.test),
    )
