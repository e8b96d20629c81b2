"""Child processes of this package: started, known, and ended with everything they started.

They import the very code of their parent: a checkout may lie beside an installed package. Each
leads a session of its own, so Ctrl-C in a terminal reaches the parent alone, which decides, and one
signal to the process group ends compilers that a child has started.
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

from mlflow_pt_deploy import interrupt

_PARENT_EVERY_S = 0.5

_lock = threading.Lock()  # no child may start once all were ended; never taken by a signal handler
_running: set[subprocess.Popen[Any]] = set()


def command(module: str, *arguments: str) -> list[str]:
    """The command line that runs a module of this package.

    A file in the working folder takes no library's place, be it called ``datasets.py``: ``-P``.
    """
    return [sys.executable, "-P", "-m", f"mlflow_pt_deploy.{module}", *arguments]


def environment(**variables: str) -> dict[str, str]:
    """The environment of this process, with its import path."""
    path = os.pathsep.join(os.fspath(path) or os.getcwd() for path in sys.path)
    return {**os.environ, "PYTHONPATH": path, **variables}


def start(arguments: list[str], **options: Any) -> subprocess.Popen[Any]:
    """Start a child process; hand it to `end`, whatever happens.

    Args:
        arguments: See `command`.
        options: Of `subprocess.Popen`.

    Raises:
        Interrupted: A signal asked this process to end.
    """
    with _lock:
        interrupt.check()
        child = subprocess.Popen(arguments, start_new_session=True, **options)
        _running.add(child)
        return child


def kill(child: subprocess.Popen[Any]) -> None:
    """Kill a child and what it has started; it is still to be reaped."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)


def end(child: subprocess.Popen[Any]) -> None:
    """Kill a child and what it has started, reap it, and close its pipes; twice is fine."""
    if child not in _running:
        return
    kill(child)
    with suppress(BrokenPipeError), child:  # what was not yet written is lost
        pass
    _running.discard(child)


def kill_all() -> None:
    """Kill every child that still runs; safe to call from any thread."""
    with _lock:
        for child in list(_running):
            kill(child)


def end_with_parent() -> None:
    """In a child: end it and what it has started when its parent is gone, even by SIGKILL."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_EVERY_S)
        if os.getpgid(0) == os.getpid():  # `start` made it so
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()
