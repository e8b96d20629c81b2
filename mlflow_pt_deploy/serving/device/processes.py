"""Starts the process of a device when the first worker needs it, and again after it has ended.

    RUN_DIR/
    ├── device-cuda-0.start    held (flock) by a worker that starts the process
    ├── device-cuda-0.lock     held (flock) by the process
    ├── device-cuda-0.sock     where it listens
    ├── device-cuda-0.json     when it was started, and how often
    └── tmp-device-cuda-0/     its temporary files

The process is in a session of its own, so it outlives the worker that started it.
"""

from __future__ import annotations

import fcntl
import logging
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass

from mlflow_pt_deploy.errors import DeviceLostError
from mlflow_pt_deploy.serving.device.channel import Channel, file_name
from mlflow_pt_deploy.serving.worker_state import WorkerStates
from mlflow_pt_deploy.system import child_process
from mlflow_pt_deploy.system.socket_address import SocketAddress

BACKOFF_S, MAX_BACKOFF_S = 1.0, 60.0

_MODULE = "serving.device.process"
_START_S = 120.0
_POLL_S = 0.02

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StartState:
    """The last start of a device's process.

    Attributes:
        starts: How often it was started.
        started_at: The last time, by `time.monotonic`, which is one clock for all processes.
        backoff_s: Seconds from there to the next start, at least.
    """

    starts: int = 0
    started_at: float = 0.0
    backoff_s: float = 0.0

    def remaining_s(self, now: float) -> float:
        """Seconds until it may be started."""
        return max(0.0, self.started_at + self.backoff_s - now) if self.starts else 0.0

    def after_start(self, now: float) -> StartState:
        """The state once it is started; the wait doubles, unless it ran for long."""
        again = self.starts and now - self.started_at < self.backoff_s + MAX_BACKOFF_S
        backoff_s = min(2 * self.backoff_s, MAX_BACKOFF_S) if again else BACKOFF_S
        return StartState(self.starts + 1, now, backoff_s)


class DeviceProcesses:
    """Connects a worker to the processes of devices; thread-safe, waits for them.

    Args:
        states: The run directory.
        main_pid: Process id of the main process, with which they end.
        hang_s: See `ServerSettings.hang_s`.
        log_format: See `ServerSettings.log_format`.
        cores: Cores that they may use; empty: those of the worker.
    """

    def __init__(
        self,
        states: WorkerStates,
        main_pid: int,
        hang_s: float,
        log_format: str,
        cores: Sequence[int] = (),
    ) -> None:
        self.hang_s = hang_s
        self._states = states
        self._arguments = (str(main_pid), f"{hang_s:g}", log_format, ",".join(map(str, cores)))
        self._children: list[subprocess.Popen[bytes]] = []

    def connect(self, device: str) -> Channel:
        """Connect to the process of a device; it is started if it does not run.

        Raises:
            DeviceLostError: It has ended a moment ago and is not started yet, or it does not start.
        """
        try:
            return self.dial(device)
        except OSError:
            pass  # it does not run
        with self._may_start(device):
            try:
                return self.dial(device)  # another worker has started it
            except OSError:
                return self._start(device)

    def state(self, device: str) -> StartState:
        """The last start of a device's process."""
        return StartState(**self._states.document(file_name(device)))

    def dial(self, device: str) -> Channel:
        """Connect to the process of a device.

        Raises:
            OSError: It does not run.
        """
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            address = SocketAddress(self._states.folder, f"{file_name(device)}.sock")
            with closing(address):
                connection.connect(address.path)
        except OSError:
            connection.close()
            raise
        return Channel(connection)

    @contextmanager
    def _may_start(self, device: str) -> Iterator[None]:
        with (self._states.folder / f"{file_name(device)}.start").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _start(self, device: str) -> Channel:
        before, now = self.state(device), time.monotonic()
        if wait_s := before.remaining_s(now):
            raise DeviceLostError(
                f"the process of {device} has ended; it is started again in {wait_s:.0f} s"
            )
        self._reap()
        self._states.publish(file_name(device), asdict(before.after_start(now)))
        child = child_process.start(
            child_process.command(_MODULE, str(self._states.folder), device, *self._arguments),
            env=child_process.environment(
                TMPDIR=str(self._states.folder / f"tmp-{file_name(device)}")
            ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        self._children.append(child)
        while child.poll() is None and time.monotonic() < now + _START_S:
            try:
                return self.dial(device)
            except OSError:
                time.sleep(_POLL_S)
        child_process.end(child)
        raise DeviceLostError(f"the process of {device} does not start; the log says why")

    def _reap(self) -> None:
        """Forget children that have ended."""
        for child in self._children:
            if child.poll() is not None:
                child_process.end(child)
        self._children = [child for child in self._children if child.returncode is None]
