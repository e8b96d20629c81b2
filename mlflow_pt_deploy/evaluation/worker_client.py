"""Client of a worker process: start it, send requests, explain failures and clean up."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mlflow_pt_deploy.errors import VariantError, describe_exit, root_cause
from mlflow_pt_deploy.evaluation.profile import RowCounts
from mlflow_pt_deploy.preprocessing import Row, row_to_json
from mlflow_pt_deploy.system import child_process as child
from mlflow_pt_deploy.system import interrupt
from mlflow_pt_deploy.system.device import AUTO
from mlflow_pt_deploy.system.hardware import THREAD_VARIABLES

_PREDICT_ROWS = 2048  # rows per request, so that the time limit is independent of the data size
_STDERR_BYTES = 4096
_STDERR_LINES = 5
_SHORT_ROW = 12  # characters


class Predictions(NamedTuple):
    """Predicted labels, int64 (rows,), and confidences, float32 (rows,)."""

    labels: npt.NDArray[np.int64]
    confidence: npt.NDArray[np.float32]


class Worker:
    """One variant in a process of its own. Use as a context manager to end the process.

    Args:
        folder: Folder of the variant.
        first_row: A raw row; start-up ends with its prediction.
        device: See `load_variant`.
        threads: Threads per call, at least 1.
        timeout_s: Maximum time for one reply, including loading.

    Attributes:
        load_s: Seconds from the start of the process to its first prediction.
        model, runtime, precision: From the manifest of the variant.

    Raises:
        VariantError: The variant cannot be loaded, or not within the timeout.
    """

    def __init__(
        self,
        folder: Path,
        first_row: Row,
        *,
        device: str = AUTO,
        threads: int = 1,
        timeout_s: float = 600.0,
    ) -> None:
        self.name = folder.name
        self._timeout_s = timeout_s
        self._private = _texts((first_row,))
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (closed in `close`)
        options = ("--device", device, "--threads", str(threads))
        start = perf_counter()
        self._process = child.start(
            child.command("evaluation.worker", str(folder), *options),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=child.environment(**dict.fromkeys(THREAD_VARIABLES, str(threads))),
        )
        try:
            manifest = self._request("first", row=row_to_json(first_row))
        except BaseException:
            self.close()
            raise
        self.load_s = perf_counter() - start
        self.model, self.runtime = str(manifest["model"]), str(manifest["runtime"])
        self.precision = str(manifest["precision"])

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Process id, also after it has ended."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def load_rows(self, rows: Sequence[Row]) -> None:
        """Send the raw rows that later requests refer to by index."""
        self._private = _texts(rows)
        self._request("rows", rows=[row_to_json(row) for row in rows])

    def time(self, indices: Sequence[int], passes: int = 1) -> list[int]:
        """Predict rows one at a time, `passes` times; return nanoseconds of each, in order."""
        elapsed: list[int] = self._request("time", indices=list(indices), passes=passes)
        return elapsed

    def batch(self, indices: Sequence[int], size: int) -> int:
        """Predict rows in length-sorted batches of `size`; return the total in nanoseconds."""
        return int(self._request("batch", indices=list(indices), size=size))

    def predict(self, start: int, stop: int) -> Predictions:
        """Predict each row in [start, stop)."""
        results: list[tuple[int, float]] = []
        for first in range(start, stop, _PREDICT_ROWS):
            results += self._request("predict", start=first, stop=min(first + _PREDICT_ROWS, stop))
        labels = np.asarray([label for label, _ in results], dtype=np.int64)
        confidence = np.asarray([value for _, value in results], dtype=np.float32)
        return Predictions(labels, confidence)

    def alone(self, indices: Sequence[int], size: int) -> int:
        """Return how many rows get another label alone than in a batch of `size`, in this order."""
        return int(self._request("alone", indices=list(indices), size=size))

    def tokens(self, start: int, stop: int) -> RowCounts:
        """Return the counts of the tokens of the rows in [start, stop); of images none."""
        counts = RowCounts()
        for first in range(start, stop, _PREDICT_ROWS):
            part = self._request("tokens", start=first, stop=min(first + _PREDICT_ROWS, stop))
            counts = counts.plus(RowCounts.from_json(part))
        return counts

    def gpu(self) -> str:
        """Return the UUID of the GPU that PyTorch runs the variant on; empty if not known."""
        return str(self._request("gpu"))

    def device_time(self, indices: Sequence[int]) -> list[int]:
        """Return nanoseconds of each row on the GPU; empty if PyTorch does not run it there."""
        elapsed: list[int] = self._request("device_time", indices=list(indices))
        return elapsed

    def device_memory(self, indices: Sequence[int], size: int) -> int:
        """Return bytes that PyTorch reserves on the GPU for a batch; 0 if not known."""
        return int(self._request("device_memory", indices=list(indices), size=size))

    def tokens_of(self, indices: Sequence[int], size: int) -> int:
        """Return the tokens of the largest batch of `size` rows, with padding; of images 0."""
        return int(self._request("tokens_of", indices=list(indices), size=size))

    def memory(self) -> int:
        """Return the peak resident memory of the process, in bytes."""
        return int(self._request("memory"))

    def close(self) -> None:
        """End the process and wait for it. Idempotent."""
        stdin = self._process.stdin
        assert stdin is not None
        with suppress(OSError):
            stdin.close()  # the worker exits at the end of its input
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        child.end(self._process)
        self._stderr.close()

    def _request(self, name: str, **arguments: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        # Killing the worker ends both the write and the read below, so one timer covers both.
        timed_out = threading.Event()
        timer = threading.Timer(self._timeout_s, self._abort, [timed_out])
        timer.daemon = True
        timer.start()
        try:
            with suppress(OSError):  # the worker died; its remaining output is read below
                self._process.stdin.write(json.dumps({"do": name, **arguments}).encode() + b"\n")
                self._process.stdin.flush()
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if not line.endswith(b"\n"):
            interrupt.check()  # a worker killed by an interrupt is not a failed variant
            raise VariantError(self._explain_exit(name, timed_out=timed_out.is_set()))
        reply = json.loads(line)
        if "error" in reply:
            raise VariantError(f"{self.name}: {self._explain_error(**reply)}")
        return reply["answer"]

    def _abort(self, timed_out: threading.Event) -> None:
        timed_out.set()
        child.kill(self._process)

    def _explain_exit(self, request: str, *, timed_out: bool) -> str:
        if timed_out:
            return (
                f"{self.name}: no reply to '{request}' within {self._timeout_s:g} s; its process "
                "was killed. The variant hangs or is too slow on this machine; exclude it."
            )
        hint = ", probably out of memory; free some memory"
        outcome = describe_exit(self._process.wait(), hint)
        return f"{self.name}: its process {outcome}, during '{request}'.{self._last_output()}"

    def _explain_error(self, error: str, kind: str) -> str:
        # Errors of this package have no kind and never contain a row.
        if not kind:
            return error
        # Remove rows before shortening, because a truncated row would not be found.
        redacted = "\n".join(self._lines_without_rows(error))
        return f"{kind}: {root_cause(VariantError(redacted))}"

    def _last_output(self) -> str:
        self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(self._stderr.tell() - _STDERR_BYTES, 0))
        lines = self._stderr.read().decode("utf8", "replace").strip().splitlines()
        output = " | ".join(self._lines_without_rows("\n".join(lines[-_STDERR_LINES:])))
        return f" Last output: {output}" if output else ""

    def _lines_without_rows(self, text: str) -> list[str]:
        """Split a library message into lines and redact those that contain a row of the data.

        Libraries may truncate long rows, so the first characters are matched. Short rows may be
        common words, so they are matched only with quotation marks.
        """
        starts = {
            start
            for row in self._private
            for quoted in (repr(row), json.dumps(row), json.dumps(row, ensure_ascii=False))
            for start in ({quoted[1:25]} if len(row) >= _SHORT_ROW else {f"'{row}'", quoted})
        }
        redacted = "(redacted: contains a row of the data)"
        return [
            redacted if any(start in line for start in starts) else line.strip()
            for line in text.splitlines()
        ]


def _texts(rows: Sequence[Row]) -> tuple[str, ...]:
    """Return the rows that could appear in a message of a library: texts, but not images."""
    return tuple(row for row in rows if isinstance(row, str))
