"""Checks and cutting of splits, common to all sources."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from mlflow_pt_deploy.data.splits import Split, Splits, build_splits, limit_splits
from mlflow_pt_deploy.data.validation import Pairs
from mlflow_pt_deploy.errors import DataError

SECRET = "my card number is 4111"


def pairs(labels: str, start: str = "row") -> Pairs:
    """One distinct text per letter of `labels`."""
    return [f"{start} {number}" for number in range(len(labels))], list(labels)


def build(**given: Pairs) -> Splits:
    return build_splits(given, name="tiny", source="memory")


def counts(split: Split) -> dict[int, int]:
    return dict(Counter(split.targets.tolist()))


def rejects(message: str, **given: Pairs) -> None:
    with pytest.raises(DataError, match=message) as caught:
        build(**given)
    assert SECRET not in str(caught.value)


def test_given_splits_are_unchanged() -> None:
    splits = build(train=pairs("baab"), validation=pairs("a", "v"), test=pairs("b", "t"))
    assert splits.labels == ("a", "b")
    assert splits.train.targets.tolist() == [1, 0, 0, 1]
    assert splits.train.targets.dtype == np.int64
    assert splits.notes == ()


def test_missing_splits_are_cut_stratified() -> None:
    splits = build(train=pairs("a" * 600 + "b" * 300 + "c" * 100))
    # 20 % of 1000 for test, then 10 % of the remaining 800 for validation.
    assert counts(splits.test) == {0: 120, 1: 60, 2: 20}
    assert counts(splits.validation) == {0: 48, 1: 24, 2: 8}
    assert counts(splits.train) == {0: 432, 1: 216, 2: 72}
    rows = [*splits.train.rows, *splits.validation.rows, *splits.test.rows]
    assert sorted(rows) == sorted(map(str, pairs("a" * 1000)[0]))


def test_maximum_size_of_a_cut() -> None:
    splits = build(train=pairs("ab" * 15_000))
    assert (len(splits.test), len(splits.validation)) == (5000, 2000)


def test_cut_depends_on_the_seed_only() -> None:
    given = {"train": pairs("ab" * 50)}
    first, again, other = (
        build_splits(given, name="tiny", source="memory", seed=seed) for seed in (0, 0, 1)
    )
    assert first.train.digest == again.train.digest
    assert first.test.rows == again.test.rows != other.test.rows


def test_cut_is_the_same_on_every_machine() -> None:
    splits = build(train=pairs("ab" * 10), test=pairs("ab", "t"))
    assert splits.validation.rows == ("row 10", "row 17")


def test_label_that_occurs_once_stays_in_train() -> None:
    splits = build(train=pairs("aaaaabbbbbc"), test=pairs("ab", "t"))
    assert counts(splits.train)[2] == 1
    assert "1 of 3 labels occur once in train: c" in splits.notes


def test_smallest_cut_is_one_row() -> None:
    splits = build(train=pairs("aab"), test=pairs("ab", "t"))
    assert len(splits.validation) == 1
    assert counts(splits.train) == {0: 1, 1: 1}


def test_too_few_rows_to_cut() -> None:
    rejects("too small to cut a validation split", train=pairs("ab"), test=pairs("ab", "t"))
    rejects("too small to cut a test split", train=pairs("abc"))
    rejects("too small to cut a validation split.*give a validation split", train=pairs("aab"))


def test_rows_in_train_and_test_are_reported_and_kept() -> None:
    test = ["ROW 1", "row 2", "row 2", "new"], ["a", "b", "b", "a"]
    splits = build(train=pairs("abab"), validation=pairs("a", "v"), test=test)
    assert len(splits.test) == 4
    assert splits.notes[0].startswith("3 of 4 test rows also occur in train or validation (case")


def test_whitespace_is_stripped_from_labels_only() -> None:
    train = [" x ", "y", "z", "\tw"], ["a ", "b", " a", np.int64(7)]
    splits = build(train=train, validation=pairs("a", "v"), test=pairs("a", "t"))
    assert splits.labels == ("7", "a", "b")
    assert splits.train.rows == (" x ", "y", "z", "\tw")


@pytest.mark.parametrize("blank", ["", "  \t\n", "\u00a0", None, float("nan")])
def test_blank_texts_and_labels(blank: object) -> None:
    message = r"is missing or blank in 2 rows \(row 2, 3; the first row after the header is 1\)"
    rejects(f"test: `text` {message}", train=pairs("ab"), test=([SECRET, blank, blank], "abb"))
    rejects(f"train: `label` {message}. Corr", train=([SECRET, "x", "y"], ["a", blank, blank]))


def test_only_the_first_rows_are_listed() -> None:
    texts = ["x", *[""] * 12]
    rejects(r"in 12 rows \(row 2, 3, 4, 5, 6 and 7 more;", train=(texts, "a" * 13))


def test_values_of_a_wrong_type() -> None:
    rejects("train: `text` is not a string in 1 row", train=([SECRET, 7], "ab"))
    rejects("`label` is neither a string nor a whole", train=([SECRET, "x"], ["a", b"b"]))


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_split_without_rows(split: str) -> None:
    rejects(f"{split} has no rows. Add rows", **{"train": pairs("ab"), split: ([], [])})


def test_only_one_label() -> None:
    rejects(r"train has only one label \(a\).*Add rows with other labels", train=pairs("aaa"))


def test_labels_that_train_lacks() -> None:
    test = ([SECRET, "x", "y", "z"], ["A", "a", "c", "c"])
    rejects(
        r"test has labels that train lacks: A, c \(3 rows\). Add such rows to train, remove",
        train=pairs("abab"),
        test=test,
    )
    rejects("validation has labels that .*: c", train=pairs("ab"), validation=pairs("c", "v"))


def test_limit_is_stratified_and_keeps_every_class_of_train() -> None:
    labels = "a" * 60 + "b" * 39 + "c"
    splits = build(train=pairs(labels), validation=pairs("ab", "v"), test=pairs(labels, "t"))

    small = limit_splits(splits, 10, seed=0)

    assert counts(small.train) == {0: 5, 1: 4, 2: 1}
    assert counts(small.test) == {0: 6, 1: 4}
    assert len(small.validation) == 2
    assert small.notes[-1] == (
        "limited to 10 rows per split for a quick trial (train 10 of 100, test 10 of 100), seed 0"
    )
    assert limit_splits(splits, 10, seed=0).train.digest == small.train.digest
    assert limit_splits(splits, 100, seed=0) is splits


def test_limit_below_the_number_of_labels() -> None:
    splits = build(train=pairs("abcabc"), validation=pairs("a", "v"), test=pairs("a", "t"))
    with pytest.raises(DataError, match="2 rows cannot keep .* 3 labels. Use a limit of 3 or more"):
        limit_splits(splits, 2, seed=0)


def test_digest_depends_on_rows_and_targets() -> None:
    split = Split(("ab", "c"), np.array([0, 1]))
    assert split.digest == Split(("ab", "c"), np.array([0, 1], dtype=np.int32)).digest
    others = [Split(("a", "bc"), np.array([0, 1])), Split(("ab", "c"), np.array([1, 1]))]
    assert split.digest not in [other.digest for other in others]
    assert len(split.digest) == 8
