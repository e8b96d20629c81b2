"""Detection of the task from columns and labels; CSV and Parquet give the same result."""

from __future__ import annotations

from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest

from mlflow_pt_deploy.data import Splits, load_data
from mlflow_pt_deploy.errors import DataError

TEXTS = [f"text number {row}" for row in range(12)]
SECRET = "mother's maiden name"


def write_both(folder: Path, **columns: Any) -> list[str]:
    """Write a table as CSV and as Parquet with pandas."""
    frame = pd.DataFrame(columns)
    frame.to_csv(folder / "rows.csv", index=False)
    frame.to_parquet(folder / "rows.parquet")
    return [str(folder / "rows.csv"), str(folder / "rows.parquet")]


def load_both(folder: Path, **columns: Any) -> Splits:
    """Load both formats and check that the result is the same."""
    csv, parquet = (load_data(spec) for spec in write_both(folder, **columns))
    assert (csv.labels, csv.notes) == (parquet.labels, parquet.notes)
    assert csv.train.digest == parquet.train.digest
    return csv


def rejects(folder: Path, message: str, **columns: Any) -> None:
    for spec in write_both(folder, **columns):
        with pytest.raises(DataError, match=message) as caught:
            load_data(spec)
        assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("text", "text_pair"),
        ("sentence1", "sentence2"),
        ("Sentence_A", "Sentence_B"),
        ("premise", "hypothesis"),
        ("question", "context"),
        ("query", "passage"),
        ("question1", "question2"),
        ("text", "textPair"),
        ("text", "text2"),
        ("text", "hypothesis"),
        ("s1", "s2"),
        ("first_sentence", "second_sentence"),
        ("prompt", "response"),
        ("text_left", "text_right"),
    ],
)
def test_two_texts_per_row(tmp_path: Path, first: str, second: str) -> None:
    columns = {first: TEXTS, second: [SECRET] * 12, "label": ["a", "b"] * 6}
    message = rf"more than one text per row \(`{first}` and `{second}`\).*Keep one text per row"
    rejects(tmp_path, message, **columns)


def test_parquet_columns_are_always_named(tmp_path: Path) -> None:
    pd.DataFrame({"mean radius (mm)": [1.0]}).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"it has mean radius \(mm\)\. Name the columns"):
        load_data(str(tmp_path / "x.parquet"))


def test_two_images_per_row(tmp_path: Path) -> None:
    columns = {"image1": [b"1"] * 4, "image2": [b"2"] * 4, "label": ["a", "b"] * 2}
    rejects(tmp_path, r"more than one image per row \(`image1` and `image2`\)", **columns)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"tokens": ["a"], "ner_tags": ["O"]}, "looks like data for token classification"),
        ({"image": ["a.png"], "bbox": ["1"]}, "looks like data for object detection"),
        ({"text": ["a"], "score": [0.5]}, "looks like data for regression, which is not"),
        ({"anchor": ["a"], "positive": ["b"], "negative": ["c"]}, "for similarity or ranking"),
        (
            {"text": ["a"], "label_1": ["x"], "label_2": ["y"]},
            "several label columns",
        ),
        ({"review": ["a"], "rating": [5]}, "Rename `review` to `text` and rename `rating` to"),
        ({"age": [1], "s1": [2], "s2": [3], "s3": [4]}, "it has age, s1, s2, s3. Name the"),
        ({"sentence": ["a"], "intent": ["x"]}, "Rename `sentence` to `text` and rename `intent` "),
        ({"Text": ["a"], "Label": ["x"]}, "Rename `Text` to `text` and rename `Label` to `label`"),
        ({" text": ["a"], "label ": ["x"]}, "Rename ` text` to `text` and rename `label ` to"),
        ({"text": ["a"], "class": ["x"], "topic": ["y"]}, "Rename `class` or `topic` to `label`"),
        ({"text": ["a"], "labels": ["x"], "topic": ["y"]}, "Rename `labels` to `label`"),
        ({"photo": ["a.png"], "image": ["x"]}, "more than one image|Name the columns"),
        ({"a": ["a"], "b": ["x"]}, r"has no column `text` and `label`; it has a, b. Name the col"),
    ],
)
def test_columns_with_other_names_or_for_other_tasks(
    tmp_path: Path, columns: dict[str, list[str]], message: str
) -> None:
    rejects(tmp_path, message, **columns)


def test_one_column_per_label(tmp_path: Path) -> None:
    flags: list[list[Any]] = [[0, 1] * 6, [True, False] * 6, [0.0, 1.0] * 6]
    for cells in flags:
        rejects(
            tmp_path,
            r"no column `label` but several columns of 0 and 1 \(toxic, insult\).*multi-label",
            id=range(12),
            text=TEXTS,
            toxic=cells,
            insult=cells[::-1],
        )


def test_unused_columns_are_listed(tmp_path: Path) -> None:
    splits = load_both(tmp_path, id=range(12), text=TEXTS, title=TEXTS, label=["a", "b"] * 6)
    assert "columns not used: id, title" in splits.notes
    pd.DataFrame({"text": TEXTS, "label": ["a", "b"] * 6, "x": 0}).to_csv(
        tmp_path / "train.csv", index=False
    )
    pd.DataFrame({"label": ["a", "b"], "text": ["y", "z"]}).to_csv(tmp_path / "test.csv")
    notes = load_data(str(tmp_path)).notes
    assert "columns not used (different between splits): train: x" in notes


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["a", "b"], ("a", "b")),
        ([1, 0], ("0", "1")),
        ([True, False], ("False", "True")),
        ([1.0, 0.0], ("0", "1")),
        (["1.0", "0.0"], ("0", "1")),
        (["-1", "1"], ("-1", "1")),
        (["007", "008"], ("007", "008")),
        (["NA", "None"], ("NA", "None")),
        (["TRUE", "null"], ("TRUE", "null")),
        (["nan", "inf"], ("inf", "nan")),
        (["1e", "v1.5"], ("1e", "v1.5")),
        ([" a ", "a b"], ("a", "a b")),
        (["2020-01-01", "later"], ("2020-01-01", "later")),
        (["Clothing, Shoes", "Books"], ("Books", "Clothing, Shoes")),
        (["R&B", "C++"], ("C++", "R&B")),
        (["New York", "York"], ("New York", "York")),
        (["sport/tennis", "sport/golf"], ("sport/golf", "sport/tennis")),
        (pd.Categorical(["y", "x"]), ("x", "y")),
        (pd.Categorical([3, 4]), ("3", "4")),
        (pd.array([2, 3], dtype="Int64"), ("2", "3")),
        (pd.array([True, False], dtype="boolean"), ("False", "True")),
    ],
    ids=str,
)
def test_valid_labels(tmp_path: Path, labels: Any, classes: tuple[str, ...]) -> None:
    series = pd.concat([pd.Series(labels)] * 6, ignore_index=True)
    assert load_both(tmp_path, text=TEXTS, label=series).labels == classes


@pytest.mark.parametrize(
    "labels",
    [
        [3.8, 1.0],
        ["3.8", "4.25"],
        [Decimal("0.5"), Decimal("1")],
        ["0.5", "1"],
        ["1e-1", "2"],
        [0.1 * number for number in range(12)],
    ],
    ids=str,
)
def test_scores(tmp_path: Path, labels: list[Any]) -> None:
    message = r"`label` contains decimal numbers \(.*regression\) is not supported"
    rejects(tmp_path, message, text=TEXTS, label=(labels * 6)[:12])


@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
def test_infinite_number(tmp_path: Path, value: float) -> None:
    pd.DataFrame({"text": TEXTS, "label": [1.0, value] * 6}).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"decimal numbers \(-?inf\)"):
        load_data(str(tmp_path / "x.parquet"))


@pytest.mark.parametrize(
    "labels",
    [
        ["a|b", "a", "b"],
        ["a, b", "b, c", "a, c"],
        ["a;b", "a", "b"],
        ["joy anger", "joy", "anger"],
        ["a/b", "a", "b"],
        ['["a", "b"]', '["a"]', "[]"],
        ["['a']", "['b']", "['a' 'b']"],
        ["1 2", "2", "1"],
        ["(1, 2)", "(1,)", "()"],
    ],
    ids=str,
)
def test_several_labels_in_one_string(tmp_path: Path, labels: list[str]) -> None:
    rejects(tmp_path, "several labels in one string", text=TEXTS, label=labels * 4)


def test_numbers_with_commas(tmp_path: Path) -> None:
    rejects(tmp_path, r"numbers with commas \(2,14\)", text=TEXTS, label=["27", "2,14"] * 6)


@pytest.mark.parametrize("labels", [[["a", "b"], ["a"]], [[1, 0], [0, 1]], [["a"], ["b"]]])
def test_lists_of_labels(tmp_path: Path, labels: list[Any]) -> None:
    rejects(
        tmp_path,
        r"`label` contains (a list in 12 rows|several labels in one string).*multi-label",
        text=TEXTS,
        label=labels * 6,
    )


def test_mostly_unique_labels(tmp_path: Path) -> None:
    message = "label` has 12 different values in 12 rows.*look like ids"
    rejects(tmp_path, message, text=TEXTS, label=range(12))
    rejects(tmp_path, message, text=TEXTS, label=[f"id-{row}" for row in range(12)])


def test_one_number_in_several_notations(tmp_path: Path) -> None:
    rejects(tmp_path, "1, 01 are one number", text=TEXTS, label=["1", "01", "x"] * 4)


@pytest.mark.parametrize("missing", [None, "", "  "])
def test_missing_texts_and_labels(tmp_path: Path, missing: str | None) -> None:
    cells = ["a", "b"] * 5 + ["a", missing]
    rejects(tmp_path, r"`label` is missing or blank in 1 row \(row 12", text=TEXTS, label=cells)
    rejects(
        tmp_path,
        r"`text` is missing or blank in 1 row \(row 12",
        text=[*TEXTS[:11], missing],
        label=["a", "b"] * 6,
    )


@pytest.mark.parametrize("missing", [[1, None], [1.0, None], [True, None]])
def test_missing_numbers(tmp_path: Path, missing: list[Any]) -> None:
    rejects(tmp_path, "`label` is missing or blank in 6 rows", text=TEXTS, label=missing * 6)


@pytest.mark.parametrize(
    "cells",
    [range(12), [0.5] * 12, [date(2026, 1, 1)] * 12, [pd.Timestamp(1, unit="s")] * 12, [b"x"] * 12],
    ids=str,
)
def test_unsupported_column_types(tmp_path: Path, cells: Any) -> None:
    message = "`text` (contains only numbers|is not a string in 12 rows)"
    rejects(tmp_path, message, text=cells, label=["a", "b"] * 6)
    if not isinstance(cells[0], int | float):
        message = "`label` is neither a string nor a whole number in 12 rows"
        rejects(tmp_path, message, text=TEXTS, label=cells)


def test_texts_that_look_like_other_types_are_unchanged(tmp_path: Path) -> None:
    texts = ["123", "TRUE", "None", "NA", "1e5", "2020-01-01", "x", "007", "inf", "null", "-", "."]
    splits = load_both(tmp_path, text=texts, label=["a", "b"] * 6)
    rows = {*splits.train.rows, *splits.validation.rows, *splits.test.rows}
    assert rows == set(texts)


def test_notes_on_labels(tmp_path: Path) -> None:
    splits = load_both(tmp_path, text=TEXTS, label=["Pos", "pos", "neg"] * 4)
    assert any(note.endswith("different classes: Pos and pos") for note in splits.notes)
    splits = load_both(tmp_path, text=["same"] * 6 + TEXTS[:6], label=["a", "b"] * 6)
    assert any(
        "1 of 7 different inputs in train occur with more than" in note for note in splits.notes
    )
    splits = load_both(tmp_path, text=TEXTS, label=["O", "B-PER", "I-PER"] * 4)
    assert any("tags of single words" in note for note in splits.notes)
    many = [f"text {row}" for row in range(60)]
    splits = load_both(tmp_path, text=many, label=[row % 30 * 10 for row in range(60)])
    assert any("30 whole numbers from 0 to 290" in note for note in splits.notes)


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_other_delimiters(tmp_path: Path, delimiter: str) -> None:
    file = tmp_path / "train.csv"
    rows = "".join(f'"a, b {delimiter} {row}"{delimiter}{"xy"[row % 2]}\n' for row in range(12))
    file.write_text(f"text{delimiter}label\n{rows}")
    splits = load_data(str(file))
    assert splits.labels == ("x", "y")
    assert splits.train.rows[0].startswith(f"a, b {delimiter} ")  # type: ignore[arg-type]
    assert any("columns are separated by" in note for note in splits.notes)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends(tmp_path: Path, end: str) -> None:
    rows = "".join(f'"two\r\nlines {row}",{"xy"[row % 2]}{end}' for row in range(12))
    (tmp_path / "train.csv").write_bytes(f"text,label{end}{rows}".encode())
    splits = load_data(str(tmp_path))
    assert splits.labels == ("x", "y")
    assert splits.train.rows[0].startswith("two\r\nlines ")  # type: ignore[arg-type]


@pytest.mark.parametrize("spec", ["x" * 5000, "~no-such-user/data", "nul\0byte", "abo:~no-such/x"])
def test_invalid_paths(spec: str) -> None:
    with pytest.raises(DataError):
        load_data(spec)


def test_parquet_that_pandas_cannot_read(tmp_path: Path) -> None:
    texts = pa.array(
        [[{"a": [(1, "x")]}]] * 4, pa.list_(pa.struct([("a", pa.map_("int8", "str"))]))
    )
    pq.write_table(pa.table({"text": texts, "label": ["a", "b"] * 2}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="cannot be read|is not a string in 4 rows"):
        load_data(str(tmp_path / "x.parquet"))


def test_duplicated_column(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label,label\nx,a,b\n")
    with pytest.raises(DataError, match="has two columns `label`"):
        load_data(str(tmp_path))


def test_long_cells_and_zero_bytes(tmp_path: Path) -> None:
    texts = ["x" * 300_000, "nul\x00byte", *TEXTS[2:]]
    pd.DataFrame({"text": texts, "label": ["a", "b"] * 6}).to_csv(tmp_path / "rows.csv")
    splits = load_data(str(tmp_path / "rows.csv"))
    assert {*splits.train.rows, *splits.validation.rows, *splits.test.rows} == set(texts)
