"""A fresh process that loads one variant and runs it on request.

    python -m mlflow_pt_deploy.evaluation.worker FOLDER --device cpu --threads 2

One JSON request a line on standard input, one JSON reply a line on standard output. Imports
nothing that the variant does not import itself, because that would count towards the variant's
memory and start-up time. Knows no baseline and no statistics; its parent does.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, TextIO

from mlflow_pt_deploy.errors import PtDeployError
from mlflow_pt_deploy.preprocessing import Row, row_from_json
from mlflow_pt_deploy.runtimes.base import Logits, confidence

if TYPE_CHECKING:
    from mlflow_pt_deploy.artifacts.loading import LoadedVariant

_PREDICT_ROWS = 32


class Session:
    """A loaded variant and the rows it is asked about.

    Each public method answers the request of its name with plain JSON values; times are in
    nanoseconds and always run from the raw row to the label.
    """

    def __init__(self, loaded: LoadedVariant) -> None:
        self._loaded = loaded
        self._rows: list[Row] = []

    def first(self, row: Any) -> dict[str, str]:
        """Answer one row, and say what this is."""
        manifest = self._loaded.manifest
        return {
            "label": self._label(row_from_json(row)),
            "model": manifest.model,
            "runtime": manifest.runtime,
            "precision": manifest.precision,
        }

    def rows(self, rows: list[Any]) -> int:
        """Keep the rows that later requests name by index."""
        self._rows = [row_from_json(row) for row in rows]
        gc.collect()
        gc.freeze()  # whatever lives by now stays; later collections need not look at it
        return len(rows)

    def time(self, indices: list[int], passes: int) -> list[int]:
        """Answer rows one at a time, `passes` times over, and time each."""
        rows = [self._rows[index] for index in indices]
        # One untimed row: another process has had the cores and their caches in between.
        self._label(rows[0])
        elapsed = []
        with _no_collection():
            for _ in range(passes):
                for row in rows:
                    start = perf_counter_ns()
                    self._label(row)
                    elapsed.append(perf_counter_ns() - start)
        return elapsed

    def batch(self, indices: list[int], size: int) -> int:
        """Answer rows in batches of `size`, and time all of it, reading and sorting included."""
        rows = [self._rows[index] for index in indices]
        with _no_collection():
            start = perf_counter_ns()
            for _, logits in self._sorted_batches(rows, size):
                for index in logits.argmax(axis=1).tolist():
                    self._loaded.labels[index]
            return perf_counter_ns() - start

    def predict(self, start: int, stop: int) -> list[tuple[int, float]]:
        """Label's index and confidence for each row in [start, stop), in the order of the rows."""
        rows = self._rows[start:stop]
        answers: list[tuple[int, float]] = [(0, 0.0)] * len(rows)
        for order, logits in self._sorted_batches(rows, _PREDICT_ROWS):
            found = zip(logits.argmax(axis=1).tolist(), confidence(logits).tolist(), strict=True)
            for position, answer in zip(order, found, strict=True):
                answers[position] = answer
        return answers

    def memory(self) -> int:
        """Largest resident memory of this process so far, in bytes."""
        try:
            # Not getrusage: its ru_maxrss is inherited over exec, so a large parent would show.
            status = Path("/proc/self/status").read_text(encoding="utf8")
            return next(
                int(line.split()[1]) * 1024
                for line in status.splitlines()
                if line.startswith("VmHWM")
            )
        except (OSError, StopIteration):
            import resource

            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            return peak if sys.platform == "darwin" else peak * 1024

    def _label(self, row: Row) -> str:
        preprocessor = self._loaded.preprocessor
        logits = self._loaded.predict(preprocessor.collate(preprocessor.encode([row])))
        return self._loaded.labels[int(logits[0].argmax())]

    def _sorted_batches(self, rows: Sequence[Row], size: int) -> Iterator[tuple[list[int], Logits]]:
        """Positions and logits, batch by batch; rows of like length share one: less padding."""
        preprocessor = self._loaded.preprocessor
        encoded = preprocessor.encode(rows)
        order = sorted(range(len(rows)), key=lambda position: len(encoded[position]))
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            logits = self._loaded.predict(preprocessor.collate([encoded[i] for i in chosen]))
            yield chosen, logits


@contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _serve(session: Session, requests: TextIO, replies: TextIO) -> None:
    """Answer requests until ``quit`` or the end of the input."""
    operations: dict[str, Callable[..., Any]] = {
        name: getattr(session, name)
        for name in ("first", "rows", "time", "batch", "predict", "memory")
    }
    for line in requests:
        request = json.loads(line)
        name = request.pop("do")
        if name == "quit":
            return
        _send(replies, _attempt(partial(operations[name], **request)))


def _attempt(act: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"answer": act()}
    except PtDeployError as error:
        return {"error": str(error), "kind": ""}
    except Exception as error:  # whatever a runtime raises is the answer to this request
        return {"error": str(error), "kind": type(error).__name__}


def _send(replies: TextIO, reply: dict[str, Any]) -> None:
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


def _load(folder: Path, device: str, threads: int) -> LoadedVariant:
    from mlflow_pt_deploy.artifacts.loading import load_variant

    return load_variant(folder, device=device, threads=threads, allow_code=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Load the variant, then serve; 1 when it cannot be loaded."""
    parser = argparse.ArgumentParser(prog="python -m mlflow_pt_deploy.evaluation.worker")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args(arguments)
    # Libraries print to descriptor 1, also from C: the protocol moves to a descriptor of its own.
    replies = os.fdopen(os.dup(1), "w", encoding="utf8")
    os.dup2(2, 1)
    with replies:
        outcome = _attempt(partial(_load, options.folder, options.device, options.threads))
        if "error" in outcome:
            _send(replies, outcome)
            return 1
        _serve(Session(outcome["answer"]), sys.stdin, replies)
    # All is said, and nothing is left to write: to take PyTorch apart would last most of a second.
    os._exit(0)


if __name__ == "__main__":
    raise SystemExit(main())
