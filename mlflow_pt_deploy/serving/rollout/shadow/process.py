"""The process that scores for all shadows of a server: a child of the worker that leads.

It has the lowest priority, one thread that computes, and bounded memory. The operating system ends
it first where memory is short.
"""

from __future__ import annotations

import logging
import os
import queue
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mlflow_pt_deploy.serving.worker_state import WorkerStates
from mlflow_pt_deploy.system.child_process import end_with_parent, signal_at_parent_death
from mlflow_pt_deploy.system.process_memory import resident_mb

if TYPE_CHECKING:
    from mlflow_pt_deploy.serving.rollout.shadow.message import Sample

IDLE, NORMAL = "idle", "normal"
"""Priorities."""

MEMORY_STATUS = 71
"""Exit status if it needs too much memory."""

MAX_WAITING_BYTES = 8 * 2**20
"""Messages that wait to be scored; later ones are dropped."""

_TICK_S = 0.5
_LOWEST = 19
_OOM_FIRST = "1000"

_logger = logging.getLogger(__name__)


class ShadowProcess:
    """Receives samples, lets them be scored, and publishes what was compared.

    Args:
        folder: The run directory.
        memory_mb: Resident memory above which it ends.
    """

    def __init__(self, folder: Path, memory_mb: float) -> None:
        from mlflow_pt_deploy.serving.rollout.shadow.scorer import ShadowScorer
        from mlflow_pt_deploy.serving.rollout.shadow.store import read_results

        self._folder = folder
        self._memory_mb = memory_mb
        self._states = WorkerStates(folder, 0)
        comparisons, dropped = read_results(self._states)
        self._scorer = ShadowScorer(comparisons)
        self._dropped: Counter[str] = dropped
        self._queue: queue.SimpleQueue[tuple[int, list[Sample]]] = queue.SimpleQueue()
        # each has one writer: the thread that receives, the one that scores
        self._received_bytes = self._scored_bytes = 0

    def run(self) -> None:
        """Receive until the process ends."""
        from mlflow_pt_deploy.serving.rollout.shadow.message import (
            MAX_BYTES,
            new_address,
            new_socket,
        )

        address = new_address(self._folder)
        with suppress(FileNotFoundError):
            os.unlink(address.path)
        receiver = new_socket()
        receiver.bind(address.path)
        receiver.settimeout(_TICK_S)
        threading.Thread(target=self._score_all, name="score", daemon=True).start()
        next_tick = time.monotonic()
        while True:
            with suppress(TimeoutError):
                self._receive(receiver.recv(MAX_BYTES))
            if time.monotonic() >= next_tick:
                self._tick()
                next_tick = time.monotonic() + 2 * _TICK_S

    def _receive(self, message: bytes) -> None:
        from mlflow_pt_deploy.serving.rollout.shadow.message import unpack

        samples = unpack(message)
        if self._received_bytes - self._scored_bytes > MAX_WAITING_BYTES:
            self._dropped.update(sample.model for sample in samples)
            return
        self._received_bytes += len(message)
        self._queue.put((len(message), samples))

    def _tick(self) -> None:
        """Publish, and end the process if it needs too much memory."""
        from mlflow_pt_deploy.serving.rollout.shadow.store import write_results

        write_results(self._states, self._scorer.comparisons.values(), self._dropped)
        if (resident := resident_mb()) > self._memory_mb:
            _logger.error("shadow: %.0f MB are more than %g MB", resident, self._memory_mb)
            os._exit(MEMORY_STATUS)

    def _score_all(self) -> None:
        try:
            self._score_forever()
        except BaseException:
            _logger.exception("shadow: the process ends")
            os._exit(1)

    def _score_forever(self) -> None:
        from mlflow_pt_deploy.serving.rollout.shadow.store import read_plans

        next_look = time.monotonic()
        while True:
            if time.monotonic() >= next_look:
                self._scorer.follow(read_plans(self._states))
                next_look = time.monotonic() + 2 * _TICK_S
            with suppress(queue.Empty):
                size, samples = self._queue.get(timeout=_TICK_S)
                for sample in samples:
                    self._scorer.score(sample)
                self._scored_bytes += size


def lower_priority() -> None:
    """Take only the CPU time that nothing else wants, and be ended first for memory."""
    os.nice(_LOWEST)
    if hasattr(os, "SCHED_IDLE"):
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_OOM_FIRST, encoding="ascii")


def main() -> None:
    """Run as a child: folder, process id of the parent, memory in MB, priority, log format."""
    folder, parent, memory_mb, priority, log_format = sys.argv[1:]
    signal_at_parent_death(signal.SIGKILL)
    if os.getppid() != int(parent):
        return
    end_with_parent()
    if priority == IDLE:
        lower_priority()
    scratch = Path(os.environ["TMPDIR"])
    shutil.rmtree(scratch, ignore_errors=True)  # of a process before this one
    scratch.mkdir(mode=0o700)
    from mlflow_pt_deploy.serving.observability.server_log import configure_log

    configure_log(log_format)
    ShadowProcess(Path(folder), float(memory_mb)).run()


if __name__ == "__main__":
    main()
