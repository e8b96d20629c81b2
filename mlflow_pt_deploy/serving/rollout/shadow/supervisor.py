"""Starts the shadow process and restarts it with exponential backoff; the leader's only."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import time
from dataclasses import replace

from mlflow_pt_deploy.registry.addresses import registry_variables
from mlflow_pt_deploy.serving.rollout.shadow.process import MEMORY_STATUS
from mlflow_pt_deploy.serving.rollout.shadow.store import (
    ProcessState,
    read_process,
    write_process,
)
from mlflow_pt_deploy.serving.settings import ServerSettings
from mlflow_pt_deploy.serving.worker_state import WorkerStates
from mlflow_pt_deploy.system import child_process
from mlflow_pt_deploy.system.hardware import CORES_ENV, THREAD_VARIABLES

BACKOFF_S, MAX_BACKOFF_S = 1.0, 600.0

_MODULE = "serving.rollout.shadow.process"

_logger = logging.getLogger(__name__)


class ShadowSupervisor:
    """Keeps the process running while it is wanted.

    Args:
        states: The run directory.
        settings: Memory and priority of the process, and the format of its log.
    """

    def __init__(self, states: WorkerStates, settings: ServerSettings) -> None:
        self._states = states
        self._settings = settings
        self._child: subprocess.Popen[bytes] | None = None
        self._backoff_s = BACKOFF_S
        self._started_at = self._start_at = 0.0
        self._state: ProcessState | None = None

    def keep(self, wanted: bool) -> None:
        """Start the process, restart it if it ended, or end it if it is not wanted."""
        state = self._state or replace(read_process(self._states), pid=0)
        if not wanted:
            self.end()
            state = replace(state, pid=0)
        elif self._child is not None and (status := self._child.poll()) is not None:
            state = replace(state, pid=0, ended=self._describe(status))
            self._schedule_restart(state.ended)
        elif self._child is None and time.monotonic() >= self._start_at:
            self._child = self._start()
            state = replace(state, pid=self._child.pid, starts=state.starts + 1)
        if state != self._state:
            write_process(self._states, state)
            self._state = state

    def end(self) -> None:
        """End the process."""
        if self._child is not None:
            child_process.end(self._child)
            self._child = None

    def _start(self) -> subprocess.Popen[bytes]:
        settings, folder = self._settings, self._states.folder
        self._started_at = time.monotonic()
        command = child_process.command(
            _MODULE,
            str(folder),
            str(os.getpid()),
            f"{settings.shadow_memory_mb:g}",
            settings.shadow_priority,
            settings.log_format,
        )
        variables = {
            **registry_variables(),
            **dict.fromkeys((*THREAD_VARIABLES, CORES_ENV), "1"),
            "CUDA_VISIBLE_DEVICES": "",
            "TMPDIR": str(folder / "tmp-shadow"),
        }
        return child_process.start(
            command,
            new_session=False,
            env=child_process.environment(**variables),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )

    def _schedule_restart(self, reason: str) -> None:
        self.end()
        ended_at = time.monotonic()
        if ended_at - self._started_at > MAX_BACKOFF_S:
            self._backoff_s = BACKOFF_S
        _logger.warning("the shadow process ended: %s; restart in %g s", reason, self._backoff_s)
        self._start_at = ended_at + self._backoff_s
        self._backoff_s = min(2 * self._backoff_s, MAX_BACKOFF_S)

    def _describe(self, status: int) -> str:
        if status == MEMORY_STATUS:
            return f"it needs more than {self._settings.shadow_memory_mb:g} MB (shadow_memory_mb)"
        if status < 0:
            return f"it was ended by {signal.Signals(-status).name}"
        return f"it ended with status {status}; the log says why"
