"""Batch prediction: score a file of any size in bounded memory, and continue after a stop.

open_table ─► read, encode (a thread, one chunk ahead) ─► score ─► output
                                                                    ├► OUT.part/, then OUT
                                                                    └► standard output
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow_pt_deploy.data.columns import find_pair_columns
from mlflow_pt_deploy.data.label_kinds import format_list
from mlflow_pt_deploy.data.tables.chunk import Chunk
from mlflow_pt_deploy.data.tables.readers import (
    STANDARD_STREAM,
    TableReader,
    open_table,
    require_pyarrow,
    suffix_of,
)
from mlflow_pt_deploy.errors import DataError
from mlflow_pt_deploy.prediction.bulk_scorer import BulkScorer, EncodedChunk, one_ahead
from mlflow_pt_deploy.prediction.options import PredictionOptions
from mlflow_pt_deploy.prediction.output import (
    FileOutput,
    Output,
    StreamOutput,
    added_columns,
    rejected_file,
)
from mlflow_pt_deploy.prediction.pace import Pace
from mlflow_pt_deploy.prediction.part_folder import part_folder
from mlflow_pt_deploy.registry.addresses import explain_load_error, resolve
from mlflow_pt_deploy.registry.fetch import fetch
from mlflow_pt_deploy.registry.mlmodel import digest
from mlflow_pt_deploy.serving.model.inference_service import InferenceService
from mlflow_pt_deploy.system import interrupt
from mlflow_pt_deploy.system.progress import progress


@dataclass(frozen=True)
class PredictionResult:
    """Outcome of `predict_table`.

    Attributes:
        uri: The version that computed it.
        file: The output.
        rows: Rows of the input.
        rejected: Rows that are not in the output.
        rejected_file: Their numbers and reasons; None without such rows or without a file.
        continued: Rows that an earlier, stopped command had done.
        seconds: Duration, without loading the model.
    """

    uri: str
    file: str
    rows: int
    rejected: int
    rejected_file: Path | None
    continued: int
    seconds: float


def predict_table(
    uri: str,
    source: str,
    target: str,
    options: PredictionOptions | None = None,
    model_config: Mapping[str, Any] | None = None,
) -> PredictionResult:
    """Score a table, and write it with the predictions.

    Args:
        uri: ``models:/NAME@champion``, ``runs:/...`` or a folder.
        source: A file: .parquet, .csv, .csv.gz or .jsonl; ``-`` reads JSON lines from standard
            input.
        target: The file to write, or ``-`` for standard output.
        options: See `PredictionOptions`.
        model_config: Serving options, e.g. ``num_threads``.

    Raises:
        DataError: The input cannot be read, the output cannot be written, no row can be scored, or
            an unfinished prediction is of another input, model or options.
        PtDeployError: The model cannot be found or loaded.
    """
    options = options or PredictionOptions()
    _check_names(source, target, options)
    with tempfile.TemporaryDirectory(prefix="pt-deploy-predict-") as temporary, ExitStack() as end:
        model_uri, model_digest, service = _load(uri, Path(temporary), model_config)
        service.formatter.top_k({"top_k": options.top_k})
        column = options.column or service.loaded.preprocessor.column
        key = {
            "input": _identity(source),
            "model": model_digest,
            "options": {"column": column, "top_k": options.top_k},
        }
        restart = options.restart or source == STANDARD_STREAM
        output = end.enter_context(_open_output(target, key, restart))
        scorer = BulkScorer(service, column, Path(source).parent, options.top_k)
        job = _Job(scorer, output, column, options, source, suffix_of(target))
        continued, started = output.done.rows, time.monotonic()
        if continued:
            print(f"predict: continues after {continued:,} rows", file=sys.stderr, flush=True)
        job.run(service.loaded.preprocessor.slice_rows)
        output.finish()
        seconds = time.monotonic() - started
    done = output.done
    rejected = rejected_file(target) if done.rejected and target != STANDARD_STREAM else None
    return PredictionResult(
        model_uri, target, done.rows, done.rejected, rejected, continued, seconds
    )


@contextmanager
def _open_output(target: str, key: Mapping[str, Any], restart: bool) -> Iterator[Output]:
    if target == STANDARD_STREAM:
        yield StreamOutput()
        return
    with (
        part_folder(Path(f"{target}.part"), key, restart=restart) as folder,
        closing(FileOutput(folder, Path(target))) as output,
    ):
        yield output


class _Job:
    """One prediction, from the first row that is not done to the last."""

    def __init__(
        self,
        scorer: BulkScorer,
        output: Output,
        column: str,
        options: PredictionOptions,
        source: str,
        suffix: str,
    ) -> None:
        self._scorer, self._output, self._column = scorer, output, column
        self._options, self._source, self._suffix = options, source, suffix

    def run(self, max_rows: int) -> None:
        """Score all rows in chunks of at most `max_rows`."""
        interrupt.begin()
        with (
            closing(open_table(self._source, self._output.done.rows)) as reader,
            progress("predicting", reader.total, reader.unit, done=reader.position) as shown,
        ):
            pace = Pace(reader, shown, max_rows)
            with closing(one_ahead(lambda: self._next(reader, pace.chunk_rows))) as chunks:
                for ready in chunks:
                    self._write(ready)
                    pace.advance(len(ready.chunk), ready.chunk.position)
                    self._output.checkpoint(now=interrupt.requested())
                    interrupt.check()
            if self._output.done.columns is None:
                self._begin(reader, [])

    def _next(self, reader: TableReader, rows: int) -> EncodedChunk | None:
        """Read and encode the next chunk; runs on a thread."""
        chunk = reader.read(rows)
        if chunk is None:
            return None
        if self._output.done.columns is None:
            self._begin(reader, chunk.names())
        faults = {} if reader.names is not None else self._foreign_keys(chunk)
        return self._scorer.encode(chunk, faults)

    def _begin(self, reader: TableReader, names: list[str]) -> None:
        """Check the columns, and choose the names of the added ones."""
        names = list(names if reader.names is None else reader.names)
        if names:
            _check_columns(self._source, names, self._column, self._options)
        done = self._output.done
        done.added = added_columns(names, self._options.top_k, self._suffix)
        done.columns = names

    def _foreign_keys(self, chunk: Chunk) -> dict[int, str]:
        """Rows of JSON lines with keys that the output has no place for."""
        done, faults = self._output.done, {}
        known = {*(done.columns or ())}
        for index, record in enumerate(chunk.take(range(len(chunk)))):
            if not done.added.keys().isdisjoint(record):
                faults[index] = "has a key with the name of a prediction"
            elif self._suffix.startswith(".csv") and not known.issuperset(record):
                faults[index] = "has a key that the first rows lack; write .jsonl"
        return faults

    def _write(self, ready: EncodedChunk) -> None:
        scored = self._scorer.score(ready)
        chunk, done = scored.chunk, self._output.done
        for index, reason in sorted(scored.faults.items()):
            entry: dict[str, object] = {"row": chunk.first + index}
            if chunk.lines:
                entry["line"] = chunk.lines[index]
            if self._options.strict:
                self._output.checkpoint(now=True)  # of the chunks before
                where = ", ".join(f"{name} {number}" for name, number in entry.items())
                raise DataError(
                    f"{self._source}: {where}: {reason}. Correct it, or leave out --strict to keep "
                    "such rows apart."
                )
            self._output.reject({**entry, "reason": reason})
        self._output.write(chunk, scored.indices, scored.predictions, self._options.top_k)
        done.rows += len(chunk)
        done.rejected += len(scored.faults)


def _check_names(source: str, target: str, options: PredictionOptions) -> None:
    """Check what the names of the files tell, before the model is loaded."""
    suffixes = {suffix_of(source), suffix_of(target)}
    if source != STANDARD_STREAM and not Path(source).is_file():
        raise DataError(f"{source} is not a file. Give an existing .parquet, .csv or .jsonl file.")
    if ".parquet" in suffixes:
        require_pyarrow()
    if target == STANDARD_STREAM:
        return
    file = Path(target)
    if not file.resolve().parent.is_dir():
        raise DataError(f"the folder of {target} does not exist. Create it first.")
    if file.exists() and source != STANDARD_STREAM and file.samefile(source):
        raise DataError(f"{target} is the input too. Give another name for the output.")
    if file.is_dir() or (file.exists() and not options.overwrite):
        raise DataError(f"{target} exists. Give another name, or replace it with --overwrite.")


def _check_columns(
    source: str, names: Sequence[str], column: str, options: PredictionOptions
) -> None:
    if column not in names:
        raise DataError(
            f"{source} has no column `{column}`; it has {format_list(names)}. Name the one to "
            "score with --column."
        )
    kind, found = find_pair_columns(names)
    if found and not options.column:
        raise DataError(
            f"{source} has more than one {kind} per row ({format_list(found)}), and the model "
            f"reads one. Say with --column {column} that this is it."
        )


def _identity(source: str) -> dict[str, int] | None:
    if source == STANDARD_STREAM:
        return None
    status = os.stat(source)
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def _load(
    uri: str, folder: Path, model_config: Mapping[str, Any] | None
) -> tuple[str, str, InferenceService]:
    """Fetch, check and load a model; returns its version, its digest, and what scores rows."""
    try:
        resolved = resolve(uri)
        fetched = fetch(resolved, folder)
        loaded = fetched.load(model_config)
    except Exception as error:  # artifact stores have no common base class for errors
        raise explain_load_error(error) from error
    return resolved.uri, digest(fetched.root), loaded.service
