"""How far a long step is: a bar in a terminal, a line now and then in a log file."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

EVERY_S = 10.0


class Progress:
    """Counts what is done, and shows it on standard error.

    Args:
        what: The step, e.g. ``training``.
        total: How much there is to do.
        unit: Of what is counted.
        done: How much an earlier run did.
    """

    def __init__(self, what: str, total: int, unit: str, done: int = 0) -> None:
        self._what, self._total, self._unit, self._done = what, total, unit, done
        self._started = self._shown = time.monotonic()
        self._bar: Any = _bar(what, total, unit, done) if sys.stderr.isatty() else None

    def update(self, count: int = 1, note: str = "") -> None:
        """More is done.

        Args:
            count: How much more.
            note: What is shown beside it, e.g. the last variant's name.
        """
        self._done += count
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
        elif time.monotonic() - self._shown >= EVERY_S:
            self._line(note)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()

    def _line(self, note: str) -> None:
        self._shown = time.monotonic()
        seconds = self._shown - self._started
        beside = f", {note}" if note else ""
        print(
            f"{self._what}: {self._done}/{self._total} {self._unit}, {seconds:.0f} s{beside}",
            file=sys.stderr,
            flush=True,
        )


@contextmanager
def progress(what: str, total: int, unit: str, *, done: int = 0) -> Iterator[Progress]:
    """Show a step's progress while it lasts; see `Progress`."""
    shown = Progress(what, total, unit, done)
    try:
        yield shown
    finally:
        shown.close()


def quiet_bars() -> None:
    """Keep other libraries' bars out of a log file; what the user has set stays.

    Call it before these libraries are imported.
    """
    if not sys.stderr.isatty():
        for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(name, "1")
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        os.environ.setdefault("TQDM_DISABLE", "1")


def _bar(what: str, total: int, unit: str, done: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, initial=done, desc=what, unit=unit, leave=False, disable=not total)
