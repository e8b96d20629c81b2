"""Worker process that loads one variant and runs it on request.

    python -m mlflow_pt_deploy.evaluation.worker FOLDER --device auto --threads 2

Reads one JSON request per line from standard input and writes one JSON reply per line to standard
output. Imports only what the variant needs, because every import counts towards the measured
memory and start-up time.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, TextIO

from mlflow_pt_deploy.errors import PtDeployError
from mlflow_pt_deploy.preprocessing import Row, row_from_json
from mlflow_pt_deploy.runtimes.base import Logits, confidence
from mlflow_pt_deploy.system.device import AUTO, CPU, is_out_of_memory, release_cached_memory

if TYPE_CHECKING:
    from mlflow_pt_deploy.artifacts.loading import LoadedVariant

_PREDICT_ROWS = 32
_REQUESTS = (
    *("first", "rows", "time", "batch", "predict", "alone", "tokens", "memory"),
    *("gpu", "device_time", "device_memory", "tokens_of"),
)


class Session:
    """A loaded variant and the rows of the requests.

    Each public method implements the request of its name and returns JSON values. Times are in
    nanoseconds, measured on the host from the raw row to the label. On a GPU they include both
    copies and nothing is left running: a label is taken from logits in host memory, so `predict`
    has waited for the device.
    """

    def __init__(self, loaded: LoadedVariant) -> None:
        self._loaded = loaded
        self._rows: list[Row] = []

    def first(self, row: Any) -> dict[str, str]:
        """Predict one row; also return model, runtime and precision of the variant."""
        manifest = self._loaded.manifest
        return {
            "label": self._label(row_from_json(row)),
            "model": manifest.model,
            "runtime": manifest.runtime,
            "precision": manifest.precision,
        }

    def rows(self, rows: list[Any]) -> int:
        """Store the rows that later requests refer to by index; return their number."""
        self._rows = [row_from_json(row) for row in rows]
        gc.collect()
        gc.freeze()  # exclude all current objects from later collections
        return len(rows)

    def time(self, indices: list[int], passes: int) -> list[int]:
        """Predict rows one at a time, `passes` times; return the time of each."""
        rows = [self._rows[index] for index in indices]
        # One untimed row first, because another process has used the CPU caches in between.
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
        """Predict rows in batches of `size`; return the total time, including preprocessing."""
        rows = [self._rows[index] for index in indices]
        with _no_collection():
            start = perf_counter_ns()
            for _, logits in self._sorted_batches(rows, size):
                for index in logits.argmax(axis=1).tolist():
                    self._loaded.labels[index]
            return perf_counter_ns() - start

    def device_time(self, indices: list[int]) -> list[int]:
        """Time of each row on a GPU, by CUDA events, from its copy to the device to its logits.

        It includes the time in which the device waits for the next kernel. Empty on the CPU, and
        where the runtime is not PyTorch.
        """
        cuda = self._torch_cuda()
        if cuda is None:
            return []
        preprocessor, elapsed = self._loaded.preprocessor, []
        with cuda.device(self._loaded.device):
            for index in indices:
                inputs = preprocessor.collate(preprocessor.encode([self._rows[index]]))
                start, end = (cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                self._loaded.predict(inputs)
                end.record()
                end.synchronize()
                elapsed.append(round(start.elapsed_time(end) * 1e6))
        return elapsed

    def device_memory(self, indices: list[int], size: int) -> int:
        """Return the most memory that PyTorch took of a GPU for a batch of `size`, in bytes.

        That is what its allocator reserved: the CUDA context is not in it. 0 on the CPU, and where
        the runtime is not PyTorch.
        """
        cuda = self._torch_cuda()
        if cuda is None:
            return 0
        release_cached_memory()
        cuda.reset_peak_memory_stats(self._loaded.device)
        self.batch(indices, size)
        return int(cuda.max_memory_reserved(self._loaded.device))

    def tokens_of(self, indices: list[int], size: int) -> int:
        """Return the tokens of the largest batch of `size`, with padding; of images 0."""
        if self._loaded.preprocessor.column != "text":
            return 0
        rows = [self._rows[index] for index in indices]
        longest = max(map(len, self._loaded.preprocessor.encode(rows)))
        return min(size, len(indices)) * longest

    def gpu(self) -> str:
        """Return the UUID of the GPU that the variant runs on; empty if it is not known."""
        cuda = self._torch_cuda()
        if cuda is None:
            return ""
        uuid = str(getattr(cuda.get_device_properties(self._loaded.device), "uuid", ""))
        return f"GPU-{uuid}" if uuid and not uuid.startswith(("GPU-", "MIG-")) else uuid

    def _torch_cuda(self) -> Any:
        """PyTorch's module for CUDA, if PyTorch runs the variant on a GPU."""
        torch = sys.modules.get("torch")
        used = torch is not None and self._loaded.device != CPU and torch.cuda.is_initialized()
        return torch.cuda if torch is not None and used else None

    def predict(self, start: int, stop: int) -> list[tuple[int, float]]:
        """Return label index and confidence for each row in [start, stop), in row order."""
        rows = self._rows[start:stop]
        results: list[tuple[int, float]] = [(0, 0.0)] * len(rows)
        for order, logits in self._sorted_batches(rows, _PREDICT_ROWS):
            batch = zip(logits.argmax(axis=1).tolist(), confidence(logits).tolist(), strict=True)
            for position, result in zip(order, batch, strict=True):
                results[position] = result
        return results

    def alone(self, indices: list[int], size: int) -> int:
        """Return how many rows get another label in a batch of `size` than alone."""
        preprocessor, flipped = self._loaded.preprocessor, 0
        for start in range(0, len(indices), size):
            rows = [self._rows[index] for index in indices[start : start + size]]
            logits = self._loaded.predict(preprocessor.collate(preprocessor.encode(rows)))
            labels = [self._loaded.labels[index] for index in logits.argmax(axis=1).tolist()]
            flipped += sum(
                self._label(row) != label for row, label in zip(rows, labels, strict=True)
            )
        return flipped

    def tokens(self, start: int, stop: int) -> dict[str, Any]:
        """Return the `RowCounts` of the tokens of the rows in [start, stop); of images none."""
        from mlflow_pt_deploy.evaluation.profile import RowCounts

        preprocessor, counts = self._loaded.preprocessor, RowCounts()
        if preprocessor.column == "text":
            encoded = preprocessor.encode(self._rows[start:stop])
            counts.count_rows((), [encoded], preprocessor.unknown_id)
        return counts.to_json()

    def memory(self) -> int:
        """Return the peak resident memory of this process, in bytes."""
        try:
            # Not getrusage: ru_maxrss is inherited over exec and would include a large parent.
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
        """Yield row positions and logits per batch; rows are sorted by length to save padding."""
        preprocessor = self._loaded.preprocessor
        encoded = preprocessor.encode(rows)
        order = sorted(range(len(rows)), key=lambda position: len(encoded[position]))
        for start in range(0, len(order), size):
            positions = order[start : start + size]
            logits = self._loaded.predict(preprocessor.collate([encoded[i] for i in positions]))
            yield positions, logits


@contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _serve(session: Session, requests: TextIO, replies: TextIO) -> None:
    """Handle requests until ``quit`` or the end of the input."""
    operations: dict[str, Callable[..., Any]] = {name: getattr(session, name) for name in _REQUESTS}
    for line in requests:
        request = json.loads(line)
        name = request.pop("do")
        if name == "quit":
            return
        _send(replies, _attempt(partial(operations[name], **request)))


def _attempt(action: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"answer": action()}
    except PtDeployError as error:
        return {"error": str(error), "kind": ""}
    except Exception as error:  # errors of a runtime are reported, the worker continues
        if is_out_of_memory(error):
            release_cached_memory()
        return {"error": str(error), "kind": type(error).__name__}


def _send(replies: TextIO, reply: dict[str, Any]) -> None:
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


def _load(folder: Path, device: str, threads: int) -> LoadedVariant:
    from mlflow_pt_deploy.artifacts.loading import load_variant
    from mlflow_pt_deploy.runtimes.device_memory import unguarded

    loaded = load_variant(folder, device=device, threads=threads, allow_code=True)
    # a batch that does not fit is an error, not several batches timed as one
    return replace(loaded, predict=unguarded(loaded.predict))


def main(arguments: Sequence[str] | None = None) -> int:
    """Load the variant and handle requests; return 1 if it cannot be loaded."""
    parser = argparse.ArgumentParser(prog="python -m mlflow_pt_deploy.evaluation.worker")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default=AUTO)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args(arguments)
    # Libraries print to descriptor 1, also from C code, so replies use a descriptor of their own.
    replies = os.fdopen(os.dup(1), "w", encoding="utf8")
    os.dup2(2, 1)
    with replies:
        outcome = _attempt(partial(_load, options.folder, options.device, options.threads))
        if "error" in outcome:
            _send(replies, outcome)
            return 1
        _serve(Session(outcome["answer"]), sys.stdin, replies)
    # Skip interpreter shutdown, which takes most of a second with PyTorch. All output is flushed.
    os._exit(0)


if __name__ == "__main__":
    raise SystemExit(main())
