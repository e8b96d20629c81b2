"""End a stage on SIGTERM, SIGINT or SIGHUP at its next safe point, or after a deadline.

    signal ─► C handler ─► pipe ─► thread: record the signal, kill child processes
                                     └► no safe point in time: exit actions, exit
    stage: `check()` at each safe point raises `Interrupted`

Signal handlers do not raise: an exception could interrupt code that holds a lock, and the cleanup
would deadlock on it. A thread reads signals from a pipe, because a Python handler does not run
while the main thread is inside a long C call. Only the command line calls `handle_signals`; library
users keep Python's own handlers, and `check` does nothing.
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

GRACE_S = 4.0  # to reach a safe point and to exit from there
_SHIELDED_GRACE_S = 7.0
_EARLY_GRACE_S = 0.5  # before there is work to lose
_EXIT_ACTIONS_S = 1.5
_FORCED_EXIT_ACTIONS_S = 1.0
_SAME_REQUEST_S = 0.3  # `timeout` and `mlflow run` send a signal twice
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """A stage ends because of a signal.

    Args:
        number: Signal number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@dataclass
class _State:
    """State shared by the stage and the thread; each update is one assignment, so no lock."""

    signal: int = 0
    raised: bool = False
    begun: bool = False
    shields: int = 0
    exit_actions: dict[object, Callable[[], None]] = field(default_factory=dict)

    def reset(self) -> None:
        self.__init__()  # type: ignore[misc]


_state = _State()


def describe_signal(number: int) -> str:
    """Effect of a signal, as printed on exit."""
    return {int(signal.SIGINT): "interrupted", int(signal.SIGHUP): "hung up"}.get(
        number, "terminated"
    )


def check() -> None:
    """Safe point: raise if a signal arrived.

    Raises:
        Interrupted: A signal arrived.
    """
    if _state.signal:
        _state.raised = True
        raise Interrupted(_state.signal)


def requested() -> bool:
    """Whether the next safe point will raise, so that state can be saved first."""
    return bool(_state.signal)


def begin() -> None:
    """Mark that work can be lost from now on, so the stage gets time to reach a safe point."""
    _state.begun = True


@contextmanager
def shielded() -> Iterator[None]:
    """Give a short step more time to complete, e.g. writing a file or moving an alias."""
    _state.shields += 1
    try:
        yield
    finally:
        _state.shields -= 1


@contextmanager
def exit_action(action: Callable[[], None]) -> Iterator[None]:
    """Run `action` in a thread if the process must exit inside this block, e.g. to mark a run."""
    key = object()
    _state.exit_actions[key] = action
    try:
        yield
    finally:
        _state.exit_actions.pop(key, None)


@contextmanager
def handle_signals(
    kill_children: Callable[[], None], command: str, *, keep: bool = False
) -> Iterator[None]:
    """Let SIGTERM, SIGINT and SIGHUP end the block; does nothing outside the main thread.

    Args:
        kill_children: Called from a thread on a signal, so that waits for children return.
        command: Name to print on standard error if the process exits here.
        keep: Keep the handlers after the block, until the interpreter exits.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _state.reset()
    read, write = os.pipe()
    os.set_blocking(write, False)
    watcher = threading.Thread(
        target=_SignalWatcher(read, kill_children, command).run, name="interrupt", daemon=True
    )
    watcher.start()
    wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # nohup
    wanted = _SIGNALS[:-1] if ignored else _SIGNALS
    before = {number: signal.signal(number, _record) for number in wanted}
    try:
        yield
    finally:
        _state.begun = bool(_state.signal)  # no work can be lost after the block
        if not keep:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup)
            os.close(write)
            watcher.join()
            os.close(read)
            _state.reset()


def _record(number: int, _: object) -> None:
    _state.signal = _state.signal or number


class _SignalWatcher:
    """Reads signals from a pipe, and exits the process if the stage does not end in time.

    Args:
        pipe: Descriptor that delivers a byte per signal; end of file: the stage is over.
        kill_children, command: See `handle_signals`.
    """

    def __init__(self, pipe: int, kill_children: Callable[[], None], command: str) -> None:
        self._pipe, self._kill_children, self._command = pipe, kill_children, command

    def run(self) -> None:
        number: int | None = 0
        while number == 0:  # a byte of another signal
            number = self._read_signal(None)
        if number is None:
            return
        _record(number, None)
        started = time.monotonic()
        while True:
            with suppress(Exception):
                self._kill_children()
            again = self._read_signal(0.1)
            if again is None:
                return
            since = time.monotonic() - started
            if again and since > _SAME_REQUEST_S:
                self._exit(again, _FORCED_EXIT_ACTIONS_S)
            if since > self._grace_s():
                self._exit(number, _EXIT_ACTIONS_S)

    def _read_signal(self, timeout: float | None) -> int | None:
        """Next signal number; 0: none before the timeout; None: the stage is over."""
        if not select.select([self._pipe], [], [], timeout)[0]:
            return 0
        received = os.read(self._pipe, 1)
        if not received:
            return None
        return received[0] if received[0] in _SIGNALS else 0

    @staticmethod
    def _grace_s() -> float:
        if _state.shields:
            return _SHIELDED_GRACE_S
        return GRACE_S if _state.begun or _state.raised else _EARLY_GRACE_S

    def _exit(self, number: int, seconds: float) -> None:
        """Run the exit actions for at most `seconds`, then exit the process."""
        actions = list(_state.exit_actions.values())
        threads = [threading.Thread(target=action, daemon=True) for action in actions]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + seconds
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        with suppress(Exception):
            self._kill_children()
        with suppress(OSError):
            os.write(2, f"{self._command}: {describe_signal(number)}\n".encode())
        os._exit(128 + number)
