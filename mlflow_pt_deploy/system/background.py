"""Work that must not take CPU time from what users wait for."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Result = TypeVar("Result")

_NICE = 15


def at_low_priority(work: Callable[[], Result]) -> Result:
    """Do some work on a thread of low priority, and wait for it. Linux; elsewhere it is not low.

    Only for work that starts no threads which outlive it: they would keep the low priority.

    Raises:
        BaseException: What `work` raises.
    """
    done: Future[Result] = Future()

    def run() -> None:
        if sys.platform == "linux":  # elsewhere it would be the priority of the process
            os.setpriority(os.PRIO_PROCESS, 0, max(_NICE, os.getpriority(os.PRIO_PROCESS, 0)))
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name="low-priority", daemon=True).start()
    return done.result()
