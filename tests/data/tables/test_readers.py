"""Tables in chunks: skipping rows, damaged files, rows with faults."""

from __future__ import annotations

import gzip
import json
import sys
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlflow_pt_deploy.data.tables.readers import open_table, suffix_of
from mlflow_pt_deploy.errors import DataError

TEXTS = [f"text {number}" for number in range(10)]


def write(folder: Path, suffix: str) -> str:
    file = folder / f"table{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table({"text": TEXTS, "n": range(10)}), file, row_group_size=3)
    elif suffix == ".jsonl":
        file.write_text("".join(f"{json.dumps({'text': text})}\n\n" for text in TEXTS))
    else:
        content = "\n".join(["text", *TEXTS]).encode()
        file.write_bytes(gzip.compress(content) if suffix == ".csv.gz" else content)
    return str(file)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".csv.gz", ".jsonl"])
@pytest.mark.parametrize("skip", [0, 2, 3, 7, 10])
def test_rows_are_skipped(tmp_path: Path, suffix: str, skip: int) -> None:
    found, first = [], skip + 1
    with closing(open_table(write(tmp_path, suffix), skip)) as reader:
        while (chunk := reader.read(4)) is not None:
            assert chunk.first == first and len(chunk) <= 4
            first += len(chunk)
            found += chunk.values("text")
            position = chunk.position
            assert position == reader.position
        assert reader.position == reader.total
    assert found == TEXTS[skip:]


def test_parquet_needs_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match="not installed. Install it with: pip install pyarrow; or"):
        open_table(str(tmp_path / "t.parquet"))


def test_names_tell_the_format() -> None:
    assert [suffix_of(name) for name in ("-", "a.b.csv.gz", "x.csv")] == [
        ".jsonl",
        ".csv.gz",
        ".csv",
    ]
    with pytest.raises(DataError, match="a.json has an unsupported format. Supported formats: "):
        suffix_of("a.json")


def test_csv_rows_with_faults(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b'text;n\n"a\nb";1\nc\n\xff;2\n\nd;3\n')
    with closing(open_table(str(tmp_path / "t.csv"))) as reader:
        chunk = reader.read(10)
        assert reader.names == ["text", "n"]
    assert chunk is not None
    assert chunk.lines == [2, 4, 5, 7]
    assert chunk.faults == {
        1: "has 1 cell and the header has 2, separated by semicolons",
        2: "is not UTF-8",
    }
    assert list(chunk.take([0, 3])) == [{"text": "a\nb", "n": "1"}, {"text": "d", "n": "3"}]


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("t.csv", b"", "it is empty"),
        ("t.csv", b"te\xffxt\na\n", "line 1 is the first that is not"),
        ("t.csv", b'text\n"a\nb\n', "not valid CSV: in the row that starts at line 2 a quote"),
        ("t.csv", "text\na\n".encode("utf-16"), "it is not UTF-8 but UTF-16"),
        ("t.csv.gz", b"no gzip", "it is damaged or truncated"),
        (
            "t.csv.gz",
            gzip.compress(b"text\n" + b"a\n" * 9000, mtime=0)[:-12],
            "is damaged or truncated",
        ),
        ("t.parquet", b"text", "it is not a Parquet file, or is damaged"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes, match: str) -> None:
    (tmp_path / name).write_bytes(content)
    with (
        pytest.raises(DataError, match=match),
        closing(open_table(str(tmp_path / name))) as reader,
    ):
        while reader.read(100):
            pass
