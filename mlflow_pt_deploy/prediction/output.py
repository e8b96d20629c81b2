"""Where a batch prediction goes: a file that appears when it is complete, or standard output."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mlflow_pt_deploy.data.tables.chunk import Chunk
from mlflow_pt_deploy.data.tables.readers import suffix_of
from mlflow_pt_deploy.data.tables.writers import (
    Added,
    JsonLinesWriter,
    TableWriter,
    open_writer,
)
from mlflow_pt_deploy.errors import DataError
from mlflow_pt_deploy.prediction.part_folder import Checkpoint, PartFolder, sync

_REJECTED = "rejected.jsonl"
# A checkpoint closes the files of the output, so there are fewer of them as time goes on.
_CHECKPOINT_SHARE, _MIN_CHECKPOINT_S, _MAX_CHECKPOINT_S = 0.01, 1.0, 60.0


class Output(Protocol):
    """Takes the predictions of consecutive chunks.

    Attributes:
        done: What was written, to be kept up to date by the caller.
    """

    done: Checkpoint

    def write(
        self, chunk: Chunk, indices: Sequence[int], predictions: Sequence[Any], top_k: int
    ) -> None:
        """Write rows of a chunk with their predictions."""

    def reject(self, entry: Mapping[str, object]) -> None:
        """Keep a row apart: its number and the reason."""

    def checkpoint(self, *, now: bool) -> None:
        """Make what was written permanent, if it is time or `now` is set."""

    def finish(self) -> None:
        """Complete the output."""


def rejected_file(target: str | Path) -> Path:
    """The file of rejected rows beside an output."""
    return Path(f"{target}.{_REJECTED}")


def added_columns(names: Sequence[str], top_k: int, suffix: str) -> dict[str, str]:
    """Names and types of the columns of predictions.

    They are `label` and `score`; in CSV with several labels of each row `label_1`, `score_1`,
    `label_2`, ... If the table has one of these, all get the prefix `predicted_`.

    Args:
        names: Columns of the table.
        top_k: Labels of each row.
        suffix: Format of the output.

    Raises:
        DataError: The table has columns with the prefix too.
    """
    kinds = {"label": "string", "score": "double"}
    if top_k > 1 and suffix.startswith(".csv"):
        ranks = range(1, top_k + 1)
        kinds = {f"{name}_{rank}": kind for rank in ranks for name, kind in kinds.items()}
    elif top_k > 1:
        kinds = {name: f"list<{kind}>" for name, kind in kinds.items()}
    for prefix in ("", "predicted_"):
        found = {f"{prefix}{name}": kind for name, kind in kinds.items()}
        if found.keys().isdisjoint(names):
            return found
    raise DataError(
        "the input has columns for predictions with and without the prefix `predicted_`. Rename "
        "one of them."
    )


def _values(added: Sequence[str], predictions: Sequence[Any], top_k: int) -> Added:
    """Values of each added column."""
    if top_k == 1:
        columns = [[each[key] for each in predictions] for key in ("label", "score")]
    elif len(added) == 2:
        columns = [
            [[best[key] for best in each] for each in predictions] for key in ("label", "score")
        ]
    else:
        columns = [
            [each[rank][key] for each in predictions]
            for rank in range(top_k)
            for key in ("label", "score")
        ]
    return dict(zip(added, columns, strict=True))


class FileOutput:
    """Writes to a part folder, and moves the complete file to its place.

    Args:
        folder: The part folder.
        target: The file.
    """

    def __init__(self, folder: PartFolder, target: Path) -> None:
        self.done = folder.done
        self._folder, self._target = folder, target
        self._rejected = (folder.path / _REJECTED).open("ab")
        self._writer: TableWriter | None = None
        self._started = self._saved = time.monotonic()

    def write(
        self, chunk: Chunk, indices: Sequence[int], predictions: Sequence[Any], top_k: int
    ) -> None:
        values = _values(list(self.done.added), predictions, top_k)
        self._open_writer().append(chunk, indices, values)

    def _open_writer(self) -> TableWriter:
        if self._writer is None:
            self._writer = open_writer(
                self._folder.path,
                suffix_of(self._target.name),
                self.done.columns or (),
                self.done.added,
            )
        return self._writer

    def reject(self, entry: Mapping[str, object]) -> None:
        self._rejected.write(f"{json.dumps(entry)}\n".encode())

    def checkpoint(self, *, now: bool) -> None:
        since_s = time.monotonic() - self._saved
        share_s = _CHECKPOINT_SHARE * (time.monotonic() - self._started)
        if now or since_s >= min(max(_MIN_CHECKPOINT_S, share_s), _MAX_CHECKPOINT_S):
            self._open_writer().flush()
            self._rejected.flush()
            self._folder.save()
            self._saved = time.monotonic()

    def finish(self) -> None:
        """Move the file to its place, and the rejected rows beside it.

        Raises:
            DataError: All rows were rejected.
        """
        self.checkpoint(now=True)
        beside = rejected_file(self._target)
        if self.done.rejected:
            shutil.copyfile(self._folder.path / _REJECTED, beside)
        else:
            beside.unlink(missing_ok=True)
        if not self.done.all_rejected:
            complete = self._open_writer().finish()
            sync(complete)
            os.replace(complete, self._target)
        self.close()
        shutil.rmtree(self._folder.path)
        if self.done.all_rejected:
            raise DataError(
                f"no row could be scored, and {self._target} was not written; {beside} says why. "
                "Check the column that --column names."
            )

    def close(self) -> None:
        """Close the files as they are."""
        self._rejected.close()
        if self._writer is not None:
            self._writer.close()


class StreamOutput:
    """Writes JSON lines to standard output, and rejected rows to standard error."""

    def __init__(self) -> None:
        self.done = Checkpoint()
        self._writer = JsonLinesWriter(sys.stdout.buffer, Path("-"))

    def write(
        self, chunk: Chunk, indices: Sequence[int], predictions: Sequence[Any], top_k: int
    ) -> None:
        values = _values(list(self.done.added), predictions, top_k)
        self._writer.append(chunk, indices, values)

    def reject(self, entry: Mapping[str, object]) -> None:
        print(f"predict: rejected {json.dumps(entry)}", file=sys.stderr)

    def checkpoint(self, *, now: bool) -> None:
        self._writer.flush()

    def finish(self) -> None:
        """Write out what is buffered.

        Raises:
            DataError: All rows were rejected.
        """
        self._writer.flush()
        if self.done.all_rejected:
            raise DataError("no row could be scored. Check the column that --column names.")
