"""Child processes of this package: start, track and kill them with their descendants.

A child imports the same code as its parent, since a checkout may lie beside an installed package.
Each child leads a session of its own: Ctrl-C in a terminal reaches only the parent, and one signal
to the process group also ends compilers that the child started.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import Any

from mlflow_pt_deploy.system import interrupt

_PARENT_POLL_S = 0.5

_lock = threading.Lock()  # no child starts after `kill_all`; never taken by a signal handler
_running: set[subprocess.Popen[Any]] = set()


def command(module: str, *arguments: str) -> list[str]:
    """Command line that runs a module of this package.

    ``-P`` keeps files in the working folder, e.g. ``datasets.py``, from shadowing libraries.
    """
    return [sys.executable, "-P", "-m", f"mlflow_pt_deploy.{module}", *arguments]


def environment(**variables: str) -> dict[str, str]:
    """Environment of this process with its import path, and with more variables."""
    path = os.pathsep.join(os.fspath(path) or os.getcwd() for path in sys.path)
    return {**os.environ, "PYTHONPATH": path, **variables}


def start(
    arguments: list[str], *, new_session: bool = True, **options: Any
) -> subprocess.Popen[Any]:
    """Start a child process; the caller passes it to `end` in any case.

    Args:
        arguments: See `command`.
        new_session: False: the child leads a process group in this session. Linux shares the CPU
            between sessions first (autogroup), so only there a low priority of the child counts.
        **options: Keyword arguments of `subprocess.Popen`.

    Raises:
        Interrupted: This process received a signal to end.
    """
    with _lock:
        interrupt.check()
        group = None if new_session else 0
        child = subprocess.Popen(
            arguments, start_new_session=new_session, process_group=group, **options
        )
        _running.add(child)
        return child


def kill(child: subprocess.Popen[Any]) -> None:
    """Kill a child and its descendants; does not reap it."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)


def end(child: subprocess.Popen[Any]) -> None:
    """Kill a child and its descendants, reap it and close its pipes; idempotent."""
    if child not in _running:
        return
    kill(child)
    with suppress(BrokenPipeError), child:  # unwritten data is lost
        pass
    _running.discard(child)


def kill_all() -> None:
    """Kill all running children; thread-safe."""
    with _lock:
        for child in list(_running):
            kill(child)


def is_running(pid: int) -> bool:
    """Whether a process runs; also one of another user."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def end_with_parent() -> None:
    """In a child: exit with all descendants when the parent is gone, even by SIGKILL."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_POLL_S)
        if os.getpgid(0) == os.getpid():  # a session leader, see `start`
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def signal_at_parent_death(number: int) -> None:
    """In a child: get this signal at once when the thread that started this process ends.

    Linux only; does nothing elsewhere.
    """
    if sys.platform == "linux":
        import ctypes

        set_parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_parent_death_signal, number)
