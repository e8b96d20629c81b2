"""The folder of an unfinished prediction: whose it is, what is in it, who writes to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlflow_pt_deploy.errors import DataError
from mlflow_pt_deploy.prediction.part_folder import part_folder

KEY: dict[str, Any] = {"input": {"bytes": 1}, "model": "m", "options": {"top_k": 1}}


def write(path: Path, *, restart: bool = False, text: str = "row\n", rows: int = 1) -> int:
    """Add rows with a checkpoint, then some without; returns the rows done before."""
    with part_folder(path, KEY, restart=restart) as folder:
        before = folder.done.rows
        with (path / "rows.csv").open("a") as file:
            file.write(text)
        folder.done.rows += rows
        folder.save()
        with (path / "rows.csv").open("a") as file:
            file.write("lost")
        (path / "later.parquet").touch()
    return before


def test_files_are_cut_to_the_checkpoint(tmp_path: Path) -> None:
    part = tmp_path / "out.csv.part"
    assert [write(part), write(part)] == [0, 1]
    with part_folder(part, KEY, restart=False) as folder:
        assert folder.done.rows == 2
        assert (part / "rows.csv").read_text() == "row\nrow\n"
        assert not (part / "later.parquet").exists()
    assert write(part, restart=True) == 0


def test_a_folder_without_rows_is_removed(tmp_path: Path) -> None:
    part = tmp_path / "out.csv.part"
    with pytest.raises(KeyError), part_folder(part, KEY, restart=False):
        raise KeyError
    assert not part.exists()


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("state.json", "{", "state.json is damaged"),
        ("state.json", "[]", "state.json is damaged"),
        ("rows.csv", "", "rows.csv is incomplete"),
    ],
)
def test_a_damaged_folder(tmp_path: Path, name: str, content: str, match: str) -> None:
    part = tmp_path / "out.csv.part"
    write(part)
    (part / name).write_text(content)
    with pytest.raises(DataError, match=f"cannot be continued: {match}. Delete it, or .* --rest"):
        write(part)
    assert write(part, restart=True) == 0


def test_one_process_at_a_time(tmp_path: Path) -> None:
    part = tmp_path / "out.csv.part"
    with part_folder(part, KEY, restart=False), pytest.raises(DataError, match="another process"):
        write(part)


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    with pytest.raises(DataError, match="was not written by pt-deploy predict"):
        write(tmp_path, restart=True)
    assert (tmp_path / "precious").exists()
