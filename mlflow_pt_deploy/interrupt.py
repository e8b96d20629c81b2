"""Ends a stage on SIGTERM, Ctrl-C or a hang-up: at its next safe point, or after a deadline.

    signal ─► C handler ─► pipe ─► thread: note the request, end child processes
                                     └► no safe point in time: last acts, end the process
    stage: `check()` at each safe point raises `Interrupted`

No signal handler raises: it may interrupt code that holds a lock, and the cleanup would wait for
that lock for ever. A thread reads signals from a pipe, because a Python handler does not run while
the main thread is inside a long C call. Only the command line calls `handled`; a library user has
Python's own handlers, and `check` does nothing.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

GRACE_S = 4.0  # to the next safe point, and from there to the end; twice that under load
_SHIELDED_GRACE_S = 7.0
_EARLY_GRACE_S = 0.5  # where nothing can be lost yet
_ACTS_S = 1.5  # for the last acts
_HASTY_ACTS_S = 1.0
_SAME_REQUEST_S = 0.3  # `timeout` and `mlflow run` send a signal twice at once
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """A stage ends because a signal asked for it.

    Args:
        number: The signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@dataclass
class _State:
    """What the stage and the thread know of each other; single assignments, so without a lock."""

    signal: int = 0
    raised: bool = False
    begun: bool = False
    shields: int = 0
    acts: dict[object, Callable[[], None]] = field(default_factory=dict)

    def reset(self) -> None:
        self.__init__()  # type: ignore[misc]


_state = _State()


def ended_by(number: int) -> str:
    """What a signal did, in a word or two."""
    return {int(signal.SIGINT): "interrupted", int(signal.SIGHUP): "hung up"}.get(
        number, "terminated"
    )


def check() -> None:
    """A safe point: end here if a signal asked for it.

    Raises:
        Interrupted: It did.
    """
    if _state.signal:
        _state.raised = True
        raise Interrupted(_state.signal)


def requested() -> bool:
    """Whether the next safe point will raise: to save first what would be lost."""
    return bool(_state.signal)


def begin() -> None:
    """From here on work can be lost, so the stage is given time to reach a safe point."""
    _state.begun = True


@contextmanager
def shielded() -> Iterator[None]:
    """Give a short step time to complete, e.g. a file that is written, or a move of an alias."""
    _state.shields += 1
    try:
        yield
    finally:
        _state.shields -= 1


@contextmanager
def last_act(act: Callable[[], None]) -> Iterator[None]:
    """What the thread does if the process must end inside of this block, e.g. mark a run."""
    key = object()
    _state.acts[key] = act
    try:
        yield
    finally:
        _state.acts.pop(key, None)


@contextmanager
def handled(end_children: Callable[[], None], who: str, *, keep: bool = False) -> Iterator[None]:
    """Let SIGTERM, SIGINT and SIGHUP end what runs inside; does nothing outside the main thread.

    Args:
        end_children: Called at once from a thread, so that waits for child processes return.
        who: The command, for what is said on standard error if the process ends here.
        keep: Stay in force afterwards, until the interpreter is gone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _state.reset()
    read, write = os.pipe()
    os.set_blocking(write, False)
    watcher = threading.Thread(
        target=_Watcher(read, end_children, who).run, name="interrupt", daemon=True
    )
    watcher.start()
    wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # nohup
    wanted = _SIGNALS[:-1] if ignored else _SIGNALS
    before = {number: signal.signal(number, _note) for number in wanted}
    try:
        yield
    finally:
        _state.begun = bool(_state.signal)  # nothing can be lost in what follows
        if not keep:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup)
            os.close(write)
            watcher.join()
            os.close(read)
            _state.reset()


def _note(number: int, _: object) -> None:
    _state.signal = _state.signal or number


class _Watcher:
    """Reads signals, and ends the process if the stage does not end by itself.

    Args:
        pipe: Where signals arrive, a byte each; its end means that the stage is over.
        end_children, who: See `handled`.
    """

    def __init__(self, pipe: int, end_children: Callable[[], None], who: str) -> None:
        self._pipe, self._end_children, self._who = pipe, end_children, who

    def run(self) -> None:
        number: int | None = 0
        while number == 0:  # another signal's byte
            number = self._next(None)
        if number is None:
            return
        _note(number, None)
        started = time.monotonic()
        while True:
            with suppress(Exception):
                self._end_children()
            again = self._next(0.1)
            if again is None:
                return
            since = time.monotonic() - started
            if again and since > _SAME_REQUEST_S:
                self._end(again, _HASTY_ACTS_S)
            if since > self._grace():
                self._end(number, _ACTS_S)

    def _next(self, timeout: float | None) -> int | None:
        """The next signal; 0: none in time; None: the stage is over."""
        if not select.select([self._pipe], [], [], timeout)[0]:
            return 0
        received = os.read(self._pipe, 1)
        if not received:
            return None
        return received[0] if received[0] in _SIGNALS else 0

    @staticmethod
    def _grace() -> float:
        if _state.shields:
            return _SHIELDED_GRACE_S
        return GRACE_S if _state.begun or _state.raised else _EARLY_GRACE_S

    def _end(self, number: int, seconds: float) -> None:
        """The last acts, as far as they get, and then the process ends without another word."""
        acts = [threading.Thread(target=act, daemon=True) for act in list(_state.acts.values())]
        for act in acts:
            act.start()
        until = time.monotonic() + seconds
        for act in acts:
            act.join(max(0.0, until - time.monotonic()))
        with suppress(Exception):
            self._end_children()
        with suppress(OSError):
            os.write(2, f"{self._who}: {ended_by(number)}\n".encode())
        os._exit(128 + number)
