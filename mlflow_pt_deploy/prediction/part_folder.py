"""The folder of an unfinished batch prediction, and its checkpoints.

    OUT.part/
    ├── state.json       what is predicted, rows done, size of every other file
    ├── rows.jsonl       finished rows; Parquet: 00000.parquet, ...
    └── rejected.jsonl   rows that could not be used

Files only grow. A checkpoint records their sizes. A command that continues truncates them, so
rows that were written after the last checkpoint are computed again.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlflow_pt_deploy.errors import DataError

_STATE = "state.json"
_WORDS = {"input": "another input", "model": "another model", "options": "other options"}


@dataclass
class Checkpoint:
    """What is done.

    Attributes:
        rows: Rows of the input that were read, rejected ones included.
        rejected: Rejected rows.
        columns: Columns of the input; None before the first chunk.
        added: Types of the added columns by name.
    """

    rows: int = 0
    rejected: int = 0
    columns: list[str] | None = None
    added: dict[str, str] = field(default_factory=dict)

    @property
    def all_rejected(self) -> bool:
        """Whether rows were read and none of them could be used."""
        return 0 < self.rejected == self.rows


class PartFolder:
    """A locked folder of an unfinished prediction.

    Args:
        path: The folder.
        key: Identifies the input, the model and the options.

    Attributes:
        done: What is done; after `restore` that of the last checkpoint.
        saved_rows: Rows of the last checkpoint.
    """

    def __init__(self, path: Path, key: Mapping[str, Any]) -> None:
        self.path = path
        self.done = Checkpoint()
        self.saved_rows = 0
        self._key = dict(key)
        self._sizes: dict[str, int] = {}

    def save(self) -> None:
        """Record `done`, after all files were flushed."""
        for file in self._files():
            size = file.stat().st_size
            if self._sizes.get(file.name) != size:
                sync(file)
                self._sizes[file.name] = size
        state = {"key": self._key, "done": asdict(self.done), "files": self._sizes}
        temporary = self.path / f".{_STATE}"
        temporary.write_text(json.dumps(state), encoding="utf8")
        sync(temporary)
        os.replace(temporary, self.path / _STATE)
        self.saved_rows = self.done.rows

    def restore(self) -> None:
        """Continue at the last checkpoint, if there is one.

        Raises:
            DataError: The folder belongs to another prediction, or is damaged.
        """
        if not (self.path / _STATE).exists():
            return
        try:
            state = json.loads((self.path / _STATE).read_text(encoding="utf8"))
            key, sizes, done = state["key"], dict(state["files"]), Checkpoint(**state["done"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._unusable(f"{_STATE} is damaged") from error
        if not done.rows:
            _empty(self.path)
            return
        if different := [word for name, word in _WORDS.items() if key[name] != self._key[name]]:
            raise self._unusable(f"it was begun with {' and '.join(different)}")
        files = {file.name: file for file in self._files()}
        for name, size in sizes.items():
            if name not in files or files[name].stat().st_size < size:
                raise self._unusable(f"{name} is incomplete")
            os.truncate(files[name], size)
        for name in files.keys() - sizes.keys():
            files[name].unlink()
        self._sizes, self.done = sizes, done

    def _unusable(self, reason: str) -> DataError:
        return DataError(
            f"{self.path} cannot be continued: {reason}. Delete it, or begin again with --restart."
        )

    def _files(self) -> list[Path]:
        return [file for file in self.path.iterdir() if file.name not in (_STATE, f".{_STATE}")]


@contextmanager
def part_folder(path: Path, key: Mapping[str, Any], *, restart: bool) -> Iterator[PartFolder]:
    """Create a folder, or continue with an earlier one; no other process can do so meanwhile.

    Args:
        path, key: See `PartFolder`.
        restart: Remove an earlier folder first.

    Raises:
        DataError: See `PartFolder.restore`; or another process uses the folder.
    """
    _check_own(path)
    path.mkdir(exist_ok=True)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _lock(descriptor, path)
        folder = PartFolder(path, key)
        if restart:
            _empty(path)
        folder.restore()
        folder.save()
        try:
            yield folder
        finally:
            if not folder.saved_rows:
                shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(descriptor)


def _check_own(path: Path) -> None:
    """Never remove a folder that is not ours."""
    if not path.exists() or (path / _STATE).exists():
        return
    if not path.is_dir() or any(file.name != f".{_STATE}" for file in path.iterdir()):
        raise DataError(
            f"{path} exists and was not written by pt-deploy predict. Give another name for the "
            "output, or move it away."
        )


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise DataError(
            f"another process writes to {path}. Wait for it, or give another name for the output."
        ) from error


def _empty(path: Path) -> None:
    for file in path.iterdir():
        shutil.rmtree(file) if file.is_dir() else file.unlink()


def sync(file: Path) -> None:
    """Write a file's content to the disk."""
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())
