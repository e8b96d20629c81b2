"""Tables are written in chunks, and a later writer continues."""

from __future__ import annotations

import csv
import gzip
from contextlib import closing
from datetime import date
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlflow_pt_deploy.data.tables.chunk import RecordChunk
from mlflow_pt_deploy.data.tables.writers import open_writer
from mlflow_pt_deploy.errors import DataError

ADDED = {"label": "string"}


def chunk(*records: dict[str, object]) -> RecordChunk:
    return RecordChunk(1, 0, records, range(1, len(records) + 1))


def write(folder: Path, suffix: str, *chunks: RecordChunk) -> Path:
    """Write each chunk with a writer of its own, as after a stop."""
    for each in chunks:
        with closing(open_writer(folder, suffix, ["a", "b"], ADDED)) as writer:
            rows = range(len(each))
            writer.append(each, rows, {"label": [f"l{row}" for row in rows]})
            writer.flush()
    with closing(open_writer(folder, suffix, ["a", "b"], ADDED)) as writer:
        return writer.finish()


def test_csv_quotes_what_must_be_quoted(tmp_path: Path) -> None:
    values = ["x,y", 'a "b"', "two\nlines", "old\rmac", "", " "]
    file = write(tmp_path, ".csv.gz", *(chunk({"a": value, "b": None}) for value in values))
    with gzip.open(file, "rt", encoding="utf8", newline="") as opened:
        rows = list(csv.reader(opened))
    assert rows == [["a", "b", "label"], *([value, "", "l0"] for value in values)]


def test_json_lines_hold_what_json_lacks(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        ".jsonl",
        chunk({"a": float("nan"), "b": b"\x00"}),
        chunk({"a": date(2026, 1, 2), "b": "\ud800 שלום"}),
        chunk({"a": 1e30, "b": "שלום"}),
    )
    assert file.read_text(encoding="utf8").splitlines() == [
        '{"a": null, "b": "AA==", "label": "l0"}',
        r'{"a": "2026-01-02", "b": "\ud800 \u05e9\u05dc\u05d5\u05dd", "label": "l0"}',
        '{"a": 1e+30, "b": "שלום", "label": "l0"}',
    ]


def test_parquet_files_are_joined_with_one_schema(tmp_path: Path) -> None:
    first, second = chunk({"a": 1}, {"a": 2, "b": None}), chunk({"a": 0.5, "b": "x", "c": [1]})
    found = pq.read_table(write(tmp_path, ".parquet", first, second))
    assert found.schema.equals(
        pa.schema(
            [
                ("a", pa.float64()),
                ("b", pa.string()),
                ("c", pa.list_(pa.int64())),
                ("label", pa.string()),
            ]
        )
    )
    assert found["a"].to_pylist() == [1.0, 2.0, 0.5]
    assert found["label"].to_pylist() == ["l0", "l1", "l0"]


def test_parquet_needs_one_type_for_each_column(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="values of different types in different rows"):
        write(tmp_path, ".parquet", chunk({"a": 1}), chunk({"a": "x"}))
