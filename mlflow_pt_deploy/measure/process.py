"""The handle on a worker: a variant that is loaded in a fresh process of its own.

Knows how to start, ask and reap the process, and how to say in words why it died. Does not know
what the answers mean.
"""

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

from mlflow_pt_deploy import child, interrupt
from mlflow_pt_deploy.errors import VariantError, exit_in_words, first_line
from mlflow_pt_deploy.hardware import THREAD_VARIABLES
from mlflow_pt_deploy.preprocess import Row, row_to_json

_PREDICT_ROWS = 2048  # rows a request, so that the time limit does not depend on the data's size
_STDERR_BYTES = 4096
_STDERR_LINES = 5
_SHORT_ROW = 12  # characters


class Answers(NamedTuple):
    """Labels, int64 (rows,), and the model's confidence in each, float32 (rows,)."""

    labels: npt.NDArray[np.int64]
    confidence: npt.NDArray[np.float32]


class Worker:
    """One variant in a fresh process; use it as a context manager, so that it is always reaped.

    Args:
        folder: The variant's folder.
        first_row: A raw row; the process has started when it has answered it.
        device: ``cpu`` or ``cuda``.
        threads: Threads that one call may use, 1 or more.
        timeout_s: Longest wait for one answer, loading included.

    Attributes:
        load_s: Seconds from the start of the process to its first label.
        model, runtime, precision: From the variant's manifest.

    Raises:
        VariantError: The variant cannot be loaded, or not in time.
    """

    def __init__(
        self,
        folder: Path,
        first_row: Row,
        *,
        device: str = "cpu",
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
            child.command("measure.worker", str(folder), *options),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=child.environment(**dict.fromkeys(THREAD_VARIABLES, str(threads))),
        )
        try:
            facts = self._ask("first", row=row_to_json(first_row))
        except BaseException:
            self.close()
            raise
        self.load_s = perf_counter() - start
        self.model, self.runtime = str(facts["model"]), str(facts["runtime"])
        self.precision = str(facts["precision"])

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
        """Hand over the raw rows that later requests name by index."""
        self._private = _texts(rows)
        self._ask("rows", rows=[row_to_json(row) for row in rows])

    def time(self, indices: Sequence[int], passes: int = 1) -> list[int]:
        """Answer rows one at a time, `passes` times over; nanoseconds of each, in order."""
        elapsed: list[int] = self._ask("time", indices=list(indices), passes=passes)
        return elapsed

    def batch(self, indices: Sequence[int], size: int) -> int:
        """Answer rows in length-sorted batches of `size`; nanoseconds for all of them."""
        return int(self._ask("batch", indices=list(indices), size=size))

    def predict(self, start: int, stop: int) -> Answers:
        """What the variant answers to each row in [start, stop)."""
        found: list[tuple[int, float]] = []
        for first in range(start, stop, _PREDICT_ROWS):
            found += self._ask("predict", start=first, stop=min(first + _PREDICT_ROWS, stop))
        labels = np.asarray([label for label, _ in found], dtype=np.int64)
        return Answers(labels, np.asarray([sure for _, sure in found], dtype=np.float32))

    def memory(self) -> int:
        """Largest resident memory of the process so far, in bytes."""
        return int(self._ask("memory"))

    def close(self) -> None:
        """End the process and wait for it; closing twice is fine."""
        stdin = self._process.stdin
        assert stdin is not None
        with suppress(OSError):
            stdin.close()  # the worker takes the end of its input for "quit"
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        child.end(self._process)
        self._stderr.close()

    def _ask(self, do: str, **arguments: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        # A killed worker ends both the write and the read below, so one clock guards the two.
        expired = threading.Event()
        clock = threading.Timer(self._timeout_s, self._expire, [expired])
        clock.daemon = True
        clock.start()
        try:
            with suppress(OSError):  # it died: what it said last, if anything, is still to be read
                self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
                self._process.stdin.flush()
            line = self._process.stdout.readline()
        finally:
            clock.cancel()
        if not line.endswith(b"\n"):
            interrupt.check()  # a worker that was ended for that reason is no failure
            raise VariantError(self._death(do, timed_out=expired.is_set()))
        reply = json.loads(line)
        if "error" in reply:
            raise VariantError(f"{self.name}: {self._explain(**reply)}")
        return reply["answer"]

    def _expire(self, expired: threading.Event) -> None:
        expired.set()
        child.kill(self._process)

    def _death(self, do: str, *, timed_out: bool) -> str:
        if timed_out:
            return (
                f"{self.name}: no answer to '{do}' within {self._timeout_s:g} s, so its process "
                "was ended. The variant hangs or is far too slow here; leave it out."
            )
        killed = ", most likely because memory ran out; free some"
        how = exit_in_words(self._process.wait(), killed)
        return f"{self.name}: its process {how}, at '{do}'.{self._last_words()}"

    def _explain(self, error: str, kind: str) -> str:
        # Our own errors have no kind: they never repeat a row.
        if not kind:
            return error
        # Shortened last: a row that is cut would not be found.
        kept = "\n".join(self._lines_without_rows(error))
        return f"{kind}: {first_line(VariantError(kept))}"

    def _last_words(self) -> str:
        self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(self._stderr.tell() - _STDERR_BYTES, 0))
        lines = self._stderr.read().decode("utf8", "replace").strip().splitlines()
        said = " | ".join(self._lines_without_rows("\n".join(lines[-_STDERR_LINES:])))
        return f" It last said: {said}" if said else ""

    def _lines_without_rows(self, text: str) -> list[str]:
        """Lines that can be stored and shown: those that hold a user's row are left out.

        A library may cut a long row short, so its beginning counts; a short one may be any word,
        so it counts where it is quoted.
        """
        starts = {
            start
            for row in self._private
            for quoted in (repr(row), json.dumps(row), json.dumps(row, ensure_ascii=False))
            for start in ({quoted[1:25]} if len(row) >= _SHORT_ROW else {f"'{row}'", quoted})
        }
        left_out = "(left out: repeats a row of the data)"
        return [
            left_out if any(start in line for start in starts) else line.strip()
            for line in text.splitlines()
        ]


def _texts(rows: Sequence[Row]) -> tuple[str, ...]:
    """What a library might repeat; none writes the bytes of an image into a message."""
    return tuple(row for row in rows if isinstance(row, str))
