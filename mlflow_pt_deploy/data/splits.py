"""Train, validation and test splits, independent of the file format.

`build_splits` checks rows and labels and cuts missing splits from train, stratified and seeded.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from mlflow_pt_deploy.data.label_kinds import format_list, label_notes
from mlflow_pt_deploy.data.validation import Pairs, Row, check_labels, check_rows
from mlflow_pt_deploy.errors import DataError

Targets = npt.NDArray[np.int64]

_CUTS = {"test": (0.2, 5000), "validation": (0.1, 2000)}
"""Share of train and maximum number of rows of a missing split, in the order of cutting."""


@dataclass(frozen=True)
class Split:
    """Rows with their targets.

    Attributes:
        rows: One raw input per row: a text, or the bytes of an image file.
        targets: int64 (rows,), index into `Splits.labels` of each row.
    """

    rows: tuple[Row, ...]
    targets: Targets

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def digest(self) -> str:
        """Eight hexadecimal digits of a hash of rows and targets."""
        sha = hashlib.sha256()
        for row in self.rows:
            data = row.encode("utf-8", "surrogatepass") if isinstance(row, str) else row
            sha.update(len(data).to_bytes(8, "little") + data)
        sha.update(np.ascontiguousarray(self.targets, dtype="<i8").tobytes())
        return sha.hexdigest()[:8]


@dataclass(frozen=True)
class Splits:
    """A data set: `train` for training, `validation` for decisions, `test` for the final report.

    Attributes:
        name: Short name for tables and for MLflow's dataset, e.g. ``banking77``.
        source: The value of ``--data``.
        column: The input column, ``text`` or ``image``.
        labels: Names of the classes, sorted; targets are indices into it.
        synthetic: True if the rows were generated, not collected.
        notes: Remarks for readers of the results (labels that occur once, cut splits, ...).
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
    """Check rows and labels, and cut missing splits from train.

    Test is cut first, as 20 % of train (at most 5000 rows), then validation as 10 % (at most 2000).
    Cuts are stratified and seeded, and leave at least one row of each class in train.

    Args:
        given: Inputs and labels of `train` and optionally of `validation` and `test`.
        name: Short name of the data set.
        source: The value of ``--data``.
        column: The input column, ``text`` or ``image``.
        seed: Random seed for cutting.
        synthetic: True if the rows were generated.
        notes: Remarks of the reader.

    Raises:
        DataError: Rows or labels cannot be used.
    """
    cleaned = {split: check_rows(split, pairs, column) for split, pairs in given.items()}
    classes = check_labels({split: labels for split, (_, labels) in cleaned.items()})
    index = {label: number for number, label in enumerate(classes)}
    parts = {
        split: Split(rows, np.array([index[label] for label in labels], dtype=np.int64))
        for split, (rows, labels) in cleaned.items()
    }
    remarks = [*notes, *label_notes(cleaned["train"][1]), *_rare_labels(classes, parts["train"])]
    remarks += _contradictions(parts["train"])
    for split, (share, most) in _CUTS.items():
        if split not in parts:
            size = min(most, max(1, round(share * len(parts["train"]))))
            parts["train"], parts[split] = _cut(parts["train"], split, size, seed)
            cut = len(parts[split])
            remarks.append(
                f"no {split} split was given: {cut} rows were cut from train, seed {seed}"
            )
    remarks += _overlap(parts)
    return Splits(
        name=name,
        source=source,
        labels=classes,
        train=parts["train"],
        validation=parts["validation"],
        test=parts["test"],
        column=column,
        synthetic=synthetic,
        notes=tuple(remarks),
    )


def limit_splits(splits: Splits, limit: int, seed: int) -> Splits:
    """Keep at most `limit` rows of each split, stratified and seeded; train keeps every class.

    Raises:
        DataError: The limit is below the number of classes.
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
    note = f"limited to {limit} rows per split for a quick trial ({', '.join(cut)}), seed {seed}"
    return replace(
        splits,
        train=_sample(splits.train, limit, seed, every_class=True),
        validation=_sample(splits.validation, limit, seed),
        test=_sample(splits.test, limit, seed),
        notes=(*splits.notes, note),
    )


def _stratified_order(targets: Targets, seed: int) -> list[int]:
    """Order row indices so that every prefix has the classes in proportion."""
    shuffled = list(range(len(targets)))
    random.Random(seed).shuffle(shuffled)
    by_class: dict[int, list[int]] = {}
    for row in shuffled:
        by_class.setdefault(int(targets[row]), []).append(row)
    # Row k of the n rows of a class gets the relative position (k + 0.5) / n.
    position = {
        row: (k + 0.5) / len(rows) for rows in by_class.values() for k, row in enumerate(rows)
    }
    return sorted(shuffled, key=position.__getitem__)


def _one_of_each(targets: Targets, order: Iterable[int]) -> set[int]:
    """The first row of each class in the given order."""
    first: dict[int, int] = {}
    for row in order:
        first.setdefault(int(targets[row]), row)
    return set(first.values())


def _cut(train: Split, split: str, size: int, seed: int) -> tuple[Split, Split]:
    order = _stratified_order(train.targets, seed)
    kept = _one_of_each(train.targets, reversed(order))
    cut = [row for row in order if row not in kept][:size]
    if not cut:
        raise DataError(
            f"train is too small to cut a {split} split from it: no label has two rows left. "
            f"Add rows, or give a {split} split."
        )
    removed = set(cut)
    return _select(train, (r for r in range(len(train)) if r not in removed)), _select(train, cut)


def _sample(split: Split, limit: int, seed: int, *, every_class: bool = False) -> Split:
    order = _stratified_order(split.targets, seed)
    if every_class:
        # `limit_splits` ensures that one row of each class fits.
        first = _one_of_each(split.targets, order)
        order.sort(key=lambda row: row not in first)
    return _select(split, order[:limit])


def _select(split: Split, chosen: Iterable[int]) -> Split:
    rows = sorted(chosen)
    return Split(tuple(split.rows[row] for row in rows), split.targets[rows])


def _rare_labels(classes: Sequence[str], train: Split) -> list[str]:
    counts = np.bincount(train.targets, minlength=len(classes))
    once = [label for label, count in zip(classes, counts, strict=True) if count == 1]
    if not once:
        return []
    return [f"{len(once)} of {len(classes)} labels occur once in train: {format_list(once)}"]


def _contradictions(train: Split) -> list[str]:
    labels: dict[Row, set[int]] = {}
    for row, target in zip(train.rows, train.targets.tolist(), strict=True):
        labels.setdefault(row, set()).add(target)
    several = sum(len(targets) > 1 for targets in labels.values())
    if not several:
        return []
    return [
        f"{several} of {len(labels)} different inputs in train occur with more than one label; a "
        "model predicts one label (multi-label classification is not supported)"
    ]


def _overlap(parts: Mapping[str, Split]) -> list[str]:
    seen = {_casefold(row) for split in ("train", "validation") for row in parts[split].rows}
    known = sum(_casefold(row) in seen for row in parts["test"].rows)
    if not known:
        return []
    return [
        f"{known} of {len(parts['test'])} test rows also occur in train or validation (case "
        "ignored), so test accuracy may be overestimated"
    ]


def _casefold(row: Row) -> Row:
    return row.casefold() if isinstance(row, str) else row


def align(splits: Splits, labels: Sequence[str]) -> Splits:
    """Renumber the targets in the order of a model's classes.

    Args:
        splits: Data whose labels are classes of the model, in any order.
        labels: Names of the model's classes, in the order of its logits.

    Raises:
        DataError: The data has labels that the model lacks.
    """
    if tuple(labels) == splits.labels:
        return splits
    if unknown := sorted(set(splits.labels) - set(labels)):
        raise DataError(
            f"the model lacks {len(unknown)} labels of the data ({format_list(unknown)}); it has "
            f"{len(labels)} labels ({format_list(sorted(labels))}). Rename the labels in the data, "
            "or set id2label in the model's config.json."
        )
    number = np.asarray([list(labels).index(label) for label in splits.labels], dtype=np.int64)

    def renumbered(split: Split) -> Split:
        return Split(split.rows, number[split.targets])

    return replace(
        splits,
        labels=tuple(labels),
        train=renumbered(splits.train),
        validation=renumbered(splits.validation),
        test=renumbered(splits.test),
    )
