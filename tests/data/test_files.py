"""`load_data` with folders and files of CSV and Parquet, valid and invalid."""

from __future__ import annotations

import gzip
from pathlib import Path

import pandas as pd
import pytest

from mlflow_pt_deploy import data
from mlflow_pt_deploy.data import load_data
from mlflow_pt_deploy.errors import DataError

BANKING77 = Path(__file__).parents[3] / "shared" / "data" / "banking77"
HEADER = "text,label\n"
ROWS = "".join(f"text {n},{'ab'[n % 2]}\n" for n in range(20))
SECRET = "mother's maiden name"


def write(folder: Path, **files: str | bytes) -> str:
    """Write ``train=...`` as train.csv and so on; return the folder as a spec."""
    for stem, content in files.items():
        raw = content if isinstance(content, bytes) else content.encode()
        (folder / f"{stem}.csv").write_bytes(raw)
    return str(folder)


def test_public_names() -> None:
    assert data.__all__ == ["Split", "Splits", "load_data"]


def test_folder_of_three_csv_files(tmp_path: Path) -> None:
    spec = write(
        tmp_path,
        train=HEADER + "red,warm\nblue,cold\norange,warm\ngreen,cold\n",
        validation=HEADER + "pink,warm\n",
        test=HEADER + "violet,cold\nyellow,warm\n",
    )

    splits = load_data(spec)

    assert splits.labels == ("cold", "warm")
    assert splits.train.rows == ("red", "blue", "orange", "green")
    assert splits.train.targets.tolist() == [1, 0, 1, 0]
    assert splits.validation.rows == ("pink",)
    assert splits.test.targets.tolist() == [0, 1]
    assert (splits.name, splits.source, splits.column) == (tmp_path.name, spec, "text")
    assert splits.notes == () and not splits.synthetic


@pytest.mark.parametrize("stem", ["validation", "valid", "val", "dev"])
def test_names_of_the_validation_file(tmp_path: Path, stem: str) -> None:
    files = {"train": HEADER + ROWS, stem: HEADER + "x,a\ny,b\n", "test": HEADER + "z,a\n"}
    assert load_data(write(tmp_path, **files)).validation.rows == ("x", "y")


def test_mixed_formats_and_whole_number_labels(tmp_path: Path) -> None:
    frame = pd.DataFrame({"text": ["a", "b", "c", "d"], "label": [10, 2, 10, 2], "extra": 0.5})
    frame.to_parquet(tmp_path / "train.parquet")
    (tmp_path / "valid.csv.gz").write_bytes(gzip.compress(b"label,text\n2,e\n"))
    (tmp_path / "test.csv").write_text("text,label\nf,10\n")

    splits = load_data(str(tmp_path))

    assert splits.labels == ("10", "2")
    assert splits.train.targets.tolist() == [0, 1, 0, 1]
    assert splits.validation.rows == ("e",)


def test_single_file_is_train_and_other_splits_are_cut(tmp_path: Path) -> None:
    file = tmp_path / "reviews.csv.gz"
    file.write_bytes(gzip.compress((HEADER + ROWS).encode()))

    splits = load_data(str(file))

    assert splits.name == "reviews"
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (14, 2, 4)
    assert "no test split was given: 4 rows were cut from train, seed 0" in splits.notes
    assert "no validation split was given: 2 rows were cut from train, seed 0" in splits.notes


def test_texts_are_unchanged(tmp_path: Path) -> None:
    texts = [
        "NA",
        "null",
        "007",
        " spaced  out ",
        "👩🏽‍🚀 go",
        "שלום עולם",
        "x" * 10_000,
        'a "b"\nc',
    ]
    frame = pd.DataFrame({"text": texts, "label": ["a", "b"] * 4})
    for name in ("train", "validation", "test"):
        frame.to_csv(tmp_path / f"{name}.csv", index=False)
    (tmp_path / "more").mkdir()
    for name in ("train", "validation", "test"):
        frame.to_parquet(tmp_path / "more" / f"{name}.parquet")

    assert load_data(str(tmp_path)).train.rows == tuple(texts)
    assert load_data(str(tmp_path / "more")).train.rows == tuple(texts)


def test_byte_order_mark_is_not_part_of_the_header(tmp_path: Path) -> None:
    spec = write(tmp_path, train=b"\xef\xbb\xbf" + (HEADER + ROWS).encode())
    assert load_data(spec).labels == ("a", "b")


@pytest.mark.parametrize("spec", ["", " ", "no/such/folder", "s3:bucket"])
def test_unknown_spec_lists_supported_sources(spec: str) -> None:
    with pytest.raises(
        DataError, match=r"neither a known source nor a path.*hf:.*catalog; digits; abo:"
    ):
        load_data(spec)


def test_negative_limit() -> None:
    with pytest.raises(DataError, match="limit is -1. Give a number of rows, or 0"):
        load_data("catalog", limit=-1)


def test_folder_without_train(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no train file; it contains test.csv. Add train"):
        load_data(write(tmp_path, test=HEADER + ROWS))


@pytest.mark.parametrize("second", ["train.parquet", "train.csv.gz"])
def test_two_files_for_one_split(tmp_path: Path, second: str) -> None:
    spec = write(tmp_path, train=HEADER + ROWS)
    (tmp_path / second).touch()
    with pytest.raises(DataError, match=f"more than one file for train: train.csv and {second}"):
        load_data(spec)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "it is empty. Add train.csv"),
        (["my data.csv", "Train.csv"], "it contains Train.csv, my data.csv. Add train.csv, train"),
        (["train-00000-of-00001.parquet"], "it contains train-00000-of-00001.parquet"),
        (
            ["cats/x.png", "dogs/y.png"],
            "contains the folders cats/, dogs/, and subfolders are not",
        ),
        ([f"{n}.csv" for n in range(9)], "0.csv, 1.csv, 2.csv, 3.csv, 4.csv and 4 more"),
    ],
)
def test_folder_without_train_lists_its_contents(
    tmp_path: Path, names: list[str], message: str
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=f"has no train file; .*{message}.*valid, val, dev"):
        load_data(str(tmp_path))


def test_two_names_for_validation(tmp_path: Path) -> None:
    spec = write(tmp_path, train=HEADER + ROWS, val=HEADER + ROWS, dev=HEADER + ROWS)
    with pytest.raises(DataError, match="for validation: val.csv and dev.csv. Keep one of them"):
        load_data(spec)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("rows.xlsx", ".parquet.$"),
        ("train.csv.zip", "Extract it first"),
        ("train.tar.gz", "Extract it first"),
        ("train.jsonl", "Convert it"),
        ("train.tsv", "rename it to .csv"),
    ],
)
def test_unsupported_file_format(tmp_path: Path, name: str, hint: str) -> None:
    (tmp_path / name).touch()
    message = rf"has an unsupported format. Supported formats: .csv, .csv.gz, .*{hint}"
    with pytest.raises(DataError, match=message):
        load_data(str(tmp_path / name))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty. Write a header line"),
        (b"text,label\n", "train has no rows. Add rows"),
        (
            b"text,label\na,b\nc,d,e\n",
            "line 3 has 3 cells and the header has 2, .* in double quotes",
        ),
        (b'text,label\n"a,b\n', "not valid CSV: in the row that starts at line 2 a quote is"),
        (b'text,label\na,b\n"c" d,b\n', "the row that starts at line 3 a quote is .*text follows"),
        (b"text,label\na,b,c\nd,e,f\n", "line 2 has 3 cells and the header has 2"),
        (b"text,label\na,b,c\nd,e\n", "line 2 has 3 cells"),
        (b'text,label\n"a\n\nb",b\n\nc\n', "line 6 has 1 cell and"),
        (
            b"text;label\na;b\nc\n",
            "line 3 has 1 cell and the header has 2, separated by semi",
        ),
        (b"text,label\ncaf\xe9,b\n", "it is not UTF-8. Save it as UTF-8"),
        ("text,label\na,b\n".encode("utf-16"), "it is not UTF-8 but UTF-16"),
        (b"text,label\na,b\nc,\n", r"train: `label` is missing or blank in 1 row \(row 2;"),
        (b"\0t\0e\0x\0t\0,\0l", "it is not UTF-8 but UTF-16"),
    ],
)
def test_invalid_csv(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_data(write(tmp_path, train=content))


@pytest.mark.parametrize("name", ["train.parquet", "train.csv.gz"])
@pytest.mark.parametrize("content", [b"", b"another format", b"\x1f\x8b\x08\x00 truncated"])
def test_content_that_does_not_match_the_name(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}\)? cannot be read: it"):
        load_data(str(tmp_path))


def test_truncated_gzip_file(tmp_path: Path) -> None:
    whole = gzip.compress((HEADER + ROWS).encode())
    (tmp_path / "train.csv.gz").write_bytes(whole[:40])
    with pytest.raises(DataError, match="may be damaged or truncated"):
        load_data(str(tmp_path))


def test_missing_column_lists_existing_columns(tmp_path: Path) -> None:
    spec = write(tmp_path, train="text,category\nx,a\n")
    with pytest.raises(DataError, match=r"no column `label`; it has text, category. Rename `cat"):
        load_data(spec)
    pd.DataFrame({"sentence": ["x"], "label": ["a"]}).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"\(rows.parquet\) has no column `text`; it has sentence"):
        load_data(str(tmp_path / "rows.parquet"))


def test_first_row_of_a_file_without_a_header_is_not_shown(tmp_path: Path) -> None:
    spec = write(tmp_path, train=f"{SECRET},a\nother,b\n")
    with pytest.raises(DataError, match="first line does not look like a header") as caught:
        load_data(spec)
    assert SECRET not in str(caught.value)


def test_missing_values_in_parquet(tmp_path: Path) -> None:
    frame = pd.DataFrame({"text": [SECRET, None, "c"], "label": [1, 2, None]})
    frame.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"`text` is missing or blank in 1 row \(row 2;") as caught:
        load_data(str(tmp_path))
    assert SECRET not in str(caught.value)


def test_banking77() -> None:
    if not BANKING77.is_dir():
        pytest.skip(f"data set not found: {BANKING77}")
    splits = load_data(str(BANKING77))
    assert (splits.name, len(splits.labels)) == ("banking77", 77)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (9003, 1000, 3080)
    assert any(note.startswith("7 of 3080 test rows also occur") for note in splits.notes)
