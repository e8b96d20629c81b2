"""Progress of long steps: a bar in a terminal, occasional lines in a log file."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LINE_INTERVAL_S = 10.0


class Progress:
    """Progress of a step, shown on standard error.

    Args:
        what: Name of the step, e.g. ``training``.
        total: Number of units to process; 0: unknown.
        unit: Name of the unit.
        done: Units that an earlier run processed.
        shown: False: count only; another process shows the step.
    """

    def __init__(self, what: str, total: int, unit: str, done: int = 0, shown: bool = True) -> None:
        self._what, self._total, self._unit, self._done = what, total, unit, done
        self._started = self._shown = time.monotonic()
        self._visible = shown
        self._bar: Any = None
        if shown and total and sys.stderr.isatty():
            self._bar = _bar(what, total, unit, done)

    def update(self, count: int = 1, note: str = "") -> None:
        """Advance.

        Args:
            count: Units processed since the last call.
            note: Text to show with it, e.g. the name of a variant.
        """
        self._done += count
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
        elif self._visible and time.monotonic() - self._shown >= LINE_INTERVAL_S:
            self._print_line(note)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()

    def _print_line(self, note: str) -> None:
        self._shown = time.monotonic()
        seconds = self._shown - self._started
        suffix = f", {note}" if note else ""
        done = f"{self._done}/{self._total}" if self._total else f"{self._done}"
        print(
            f"{self._what}: {done} {self._unit}, {seconds:.0f} s{suffix}",
            file=sys.stderr,
            flush=True,
        )


@contextmanager
def progress(
    what: str, total: int, unit: str, *, done: int = 0, shown: bool = True
) -> Iterator[Progress]:
    """Show the progress of a step inside the block; see `Progress`."""
    bar = Progress(what, total, unit, done, shown)
    try:
        yield bar
    finally:
        bar.close()


def quiet_bars() -> None:
    """Disable progress bars of libraries in log files, unless the user configured them.

    Call this before importing these libraries.
    """
    if not sys.stderr.isatty():
        for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(name, "1")
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        os.environ.setdefault("TQDM_DISABLE", "1")


def _bar(what: str, total: int, unit: str, done: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, initial=done, desc=what, unit=unit, leave=False)
