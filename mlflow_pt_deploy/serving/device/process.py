"""The process that owns one device: it loads models and computes for all workers of a server.

A worker starts it, see `processes`. It ends with the main process of the server, and by itself if
one batch hangs.
"""

from __future__ import annotations

import fcntl
import logging
import os
import select
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from mlflow_pt_deploy.errors import PtDeployError, ServingError
from mlflow_pt_deploy.runtimes.base import Logits
from mlflow_pt_deploy.serving.device.channel import (
    HELLO,
    OPEN,
    PREDICT,
    WARM_UP,
    Channel,
    Message,
    error_header,
    file_name,
)
from mlflow_pt_deploy.serving.device.executor import (
    DeviceExecutor,
    HeldModel,
    device_context,
    stream_contexts,
)
from mlflow_pt_deploy.serving.device.model_store import ModelKey, ModelStore, parse_key
from mlflow_pt_deploy.system.child_process import is_running
from mlflow_pt_deploy.system.device import CUDA, kind_of
from mlflow_pt_deploy.system.hardware import SWITCH_S
from mlflow_pt_deploy.system.socket_address import SocketAddress

HANG_STATUS = 70
"""Exit status if a batch hangs."""

_TICK_S = 0.25
_BACKLOG = 1024

_logger = logging.getLogger(__name__)


class DeviceProcess:
    """Answers workers; a thread for each connection, and those that compute.

    Args:
        device: ``cpu`` or ``cuda:N``.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._store = ModelStore(device)
        self.executor = DeviceExecutor(stream_contexts(device))

    def serve(self, listener: socket.socket) -> None:
        """Accept connections until the process ends."""
        while True:
            connection, _ = listener.accept()
            connection.setblocking(True)
            channel = Channel(connection)
            threading.Thread(target=self.answer, args=(channel,), daemon=True).start()

    def answer(self, channel: Channel) -> None:
        """Answer one connection until it ends; its model is released then."""
        user = _User(self._device, self._store, self.executor)
        with closing(channel), closing(user), suppress(EOFError, OSError):
            while True:
                try:
                    message = channel.receive()
                except ServingError as error:
                    _logger.error("%s: a connection ends: %s", self._device, error)
                    break
                try:
                    header, arrays = user.answer(message)
                except Exception as error:
                    _log_unexpected(error)
                    header, arrays = error_header(error), {}
                channel.send(header, arrays)


class _User:
    """One connection: it has at most one model."""

    def __init__(self, device: str, store: ModelStore, executor: DeviceExecutor) -> None:
        self._device = device
        self._store = store
        self._executor = executor
        self._key: ModelKey | None = None
        self._model: HeldModel | None = None

    def answer(self, message: Message) -> tuple[dict[str, Any], dict[str, Any]]:
        """Header and arrays of the reply.

        Raises:
            PtDeployError: The request is invalid, or cannot be answered.
            Exception: An error of the model.
        """
        header, arrays = message
        kind = header.get("request")
        if kind == PREDICT:
            return {}, {"logits": self._predict(arrays)}
        if kind == OPEN:
            return self._open(header), {}
        if kind == WARM_UP:
            return self._warm_up(header), {}
        if kind == HELLO:
            return {"devices": _devices(self._device), "pid": os.getpid()}, {}
        raise ServingError("a message has an unknown request")

    def close(self) -> None:
        """Release the model."""
        self._model = None
        if self._key is not None:
            self._store.release(self._key)

    def _open(self, header: dict[str, Any]) -> dict[str, Any]:
        if self._key is not None:
            raise ServingError("a connection has a model already")
        key = parse_key(header)
        self._model = self._store.acquire(key, Path(str(header.get("folder"))))
        self._key = key
        return {"pads": bool(getattr(self._model.loaded.predict, "pads", True))}

    def _opened(self) -> HeldModel:
        if self._model is None:
            raise ServingError("a connection has no model yet")
        return self._model

    def _predict(self, arrays: dict[str, Any]) -> Logits:
        model = self._opened()
        axes = model.loaded.preprocessor.axes
        ranks = [array.ndim for array in arrays.values()]
        rows = {array.shape[0] for array in arrays.values() if array.ndim}
        if tuple(arrays) != tuple(axes) or min(ranks) < 2 or len(rows) != 1 or not min(rows):
            raise ServingError("a batch does not have the inputs of its model")
        return self._executor.run(model, arrays)

    def _warm_up(self, header: dict[str, Any]) -> dict[str, Any]:
        model = self._opened()
        sizes = header.get("sizes")
        if not isinstance(sizes, list) or [type(each) for each in sizes] != [int, int, int]:
            raise ServingError("a message has no sizes to prepare for")
        warm_up = getattr(model.loaded.predict, "warm_up_buckets", None)
        if warm_up is not None:
            with device_context(self._device):
                warm_up(*sizes)
        return {}


def _devices(own: str) -> list[str]:
    """All devices of the kind of one: those that PyTorch sees."""
    if kind_of(own) != CUDA:
        return [own]
    try:
        import torch
    except ModuleNotFoundError:
        return [own]
    return [f"{CUDA}:{number}" for number in range(torch.cuda.device_count())] or [own]


def _log_unexpected(error: Exception) -> None:
    if not isinstance(error, PtDeployError):
        _logger.error("the model failed (%s)", type(error).__name__, exc_info=error)


def watch(main_pid: int, running_s: Callable[[], float], hang_s: float) -> None:
    """End this process when the main process is gone, or when a batch hangs.

    Args:
        main_pid: Process id of the main process.
        running_s: Seconds since the oldest running batch began.
        hang_s: Most of them; 0: no limit.
    """
    is_gone = _death_check(main_pid)
    while not is_gone():
        if hang_s and running_s() > hang_s:
            _logger.error("device process ends: a batch has been computed for %g s", hang_s)
            os._exit(HANG_STATUS)
    os._exit(0)


def _death_check(pid: int) -> Callable[[], bool]:
    """A function that waits a moment and says whether a process is gone."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return lambda: True
    except (AttributeError, OSError):  # not Linux, or an old one
        return lambda: _is_gone_after_a_moment(pid)
    return lambda: bool(select.select([handle], [], [], _TICK_S)[0])


def _is_gone_after_a_moment(pid: int) -> bool:
    time.sleep(_TICK_S)
    return not is_running(pid)


def _listen(folder: Path, device: str) -> socket.socket | None:
    """The socket of a device; None if another process has it."""
    lock = os.open(folder / f"{file_name(device)}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the process ends
    except OSError:
        return None
    address = SocketAddress(folder, f"{file_name(device)}.sock")
    with suppress(FileNotFoundError):
        os.unlink(address.path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(address.path)
    listener.listen(_BACKLOG)
    return listener


def main() -> None:
    """Run as a child: folder, device, process id of the main process, hang_s, log format, cores."""
    folder, device, main_pid, hang_s, log_format, cores = sys.argv[1:]
    from mlflow_pt_deploy.serving.observability.server_log import configure_log

    configure_log(log_format)
    sys.setswitchinterval(SWITCH_S)
    if cores:  # a worker may be pinned to some of them
        os.sched_setaffinity(0, map(int, cores.split(",")))
    scratch = Path(os.environ["TMPDIR"])
    shutil.rmtree(scratch, ignore_errors=True)  # of a process before this one
    scratch.mkdir(mode=0o700)
    listener = _listen(Path(folder), device)
    if listener is None:
        return
    process = DeviceProcess(device)
    watcher = (int(main_pid), lambda: process.executor.running_s, float(hang_s))
    threading.Thread(target=watch, args=watcher, name="watch", daemon=True).start()
    process.serve(listener)


if __name__ == "__main__":
    main()
