"""A worker's use of one model in the process of one device; loads it again after a restart."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from mlflow_pt_deploy.errors import DeviceLostError, DeviceMemoryError, PtDeployError, root_cause
from mlflow_pt_deploy.runtimes.base import Inputs, Logits
from mlflow_pt_deploy.serving.device.channel import (
    HELLO,
    OPEN,
    PREDICT,
    WARM_UP,
    Arrays,
    Channel,
    Message,
    raise_error,
)
from mlflow_pt_deploy.serving.device.processes import DeviceProcesses

RETRY_S, MAX_RETRY_S = 0.2, 60.0
"""Seconds between tries to load a model again; the longer one after an error of the model."""

_OPEN_S = 120.0
_FULL_S, _FULL_RETRY_S = 10.0, 1.0
# The process ends itself after `hang_s` in one batch; a stopped one cannot.
_STOPPED_FACTOR, _STOPPED_S = 2.0, 5.0

_logger = logging.getLogger(__name__)


class DeviceLink:
    """One model on one device.

    One connection holds the model and notices the end of the process; others carry batches, one
    at a time each. After an end, calls fail at once until the model is loaded again.

    Args:
        processes: Connects to the process.
        device: ``cpu`` or ``cuda:N``.
        request: What the process loads, see `channel.OPEN`.

    Attributes:
        device: As given.
        rows: Rows in flight; changed by the predictor, with its lock.
        pads: Whether the model pads rows to the longest in the batch.
        pid: Process id of the process.
        problem: Why the model is not loaded; empty if it is.
    """

    def __init__(self, processes: DeviceProcesses, device: str, request: Mapping[str, Any]) -> None:
        self.device = device
        self.rows = 0
        self.pads = True
        self.pid = 0
        self.problem = f"the process of {device} has not started"
        self._processes = processes
        self._request = {"request": OPEN, **request}
        self._sizes: list[int] = []
        self._lock = threading.RLock()  # the collector may call `close` on any thread
        self._idle: list[Channel] = []
        self._generation = 0
        self._holder: Channel | None = None
        self._closed = threading.Event()

    @property
    def ready(self) -> bool:
        """Whether the model is loaded."""
        return not self.problem

    def open(self) -> None:
        """Load the model, and load it again whenever the process was started anew.

        Raises:
            PtDeployError: See `load_variant`; `DeviceLostError`: the process does not start.
        """
        holder = self._load_patiently()
        name = f"link-{self.device}"
        threading.Thread(target=self._hold, args=(holder,), name=name, daemon=True).start()

    def close(self) -> None:
        """Let the process free the model, unless other workers use it."""
        self._closed.set()
        self._lose(f"{self.device}: the model was unloaded")

    def predict(self, inputs: Inputs) -> Logits:
        """Compute a batch.

        Raises:
            DeviceLostError: The process has ended.
            PtDeployError: An error of the model.
        """
        timeout_s = _STOPPED_FACTOR * self._processes.hang_s + _STOPPED_S
        reply = self._ask(
            {"request": PREDICT}, inputs, timeout_s if self._processes.hang_s else None
        )
        logits = reply.arrays.get("logits")
        if logits is None or logits.dtype != np.float32 or logits.ndim != 2:
            raise DeviceLostError(f"the process of {self.device} sent no logits; retry later")
        return logits

    def warm_up(self, sizes: list[int]) -> None:
        """Prepare for batches, now and after each restart: most rows, most tokens, longest row."""
        self._sizes = sizes
        self._ask({"request": WARM_UP, "sizes": sizes}, {}, None)

    def status(self) -> dict[str, Any]:
        """Its part of ``/model``."""
        starts = self._processes.state(self.device).starts
        return {
            "device": self.device,
            "pid": self.pid,
            "starts": starts,
            "problem": self.problem or None,
        }

    def _ask(self, header: Mapping[str, Any], arrays: Arrays, timeout_s: float | None) -> Message:
        channel, generation = self._take()
        try:
            if channel is None:
                channel = self._processes.dial(self.device)
                raise_error(_exchange(channel, self._request, {}, timeout_s).header)
            reply = _exchange(channel, header, arrays, timeout_s)
        except (OSError, EOFError, PtDeployError) as error:
            if channel is not None:
                channel.close()
            if isinstance(error, TimeoutError):
                self._kill()
            raise self._lost() from error
        self._give_back(channel, generation)
        raise_error(reply.header)
        return reply

    def _take(self) -> tuple[Channel | None, int]:
        """A free connection with the model, None if a new one is needed; and its generation."""
        with self._lock:
            if self.problem:
                raise self._lost()
            return (self._idle.pop() if self._idle else None), self._generation

    def _give_back(self, channel: Channel, generation: int) -> None:
        with self._lock:
            if generation == self._generation:
                self._idle.append(channel)
                return
        channel.close()

    def _load(self) -> Channel:
        """Load the model; returns the connection that holds it."""
        channel = self._processes.connect(self.device)
        try:
            pid = int(_ask(channel, {"request": HELLO}).header["pid"])
            self.pads = bool(_ask(channel, self._request).header["pads"])
            if self._sizes:
                _ask(channel, {"request": WARM_UP, "sizes": self._sizes})
        except (OSError, EOFError, KeyError) as error:
            channel.close()
            raise self._lost() from error
        except BaseException:
            channel.close()
            raise
        with self._lock:
            self._holder, self.pid, self.problem = channel, pid, ""
        return channel

    def _load_patiently(self) -> Channel:
        """Load the model, after a few tries if the process has ended or the device is full.

        Memory may be short until other workers let go of the version before.
        """
        start = time.monotonic()
        while True:
            try:
                return self._load()
            except (DeviceLostError, DeviceMemoryError) as error:
                is_lost = isinstance(error, DeviceLostError)
                if time.monotonic() - start > (_OPEN_S if is_lost else _FULL_S):
                    raise
                time.sleep(RETRY_S if is_lost else _FULL_RETRY_S)

    def _hold(self, holder: Channel | None) -> None:
        """Notice the end of the process, and load the model again."""
        while holder is not None:
            if not self._closed.is_set():
                holder.wait_until_closed()
            if self._closed.is_set():
                break
            self._lose(str(self._lost()))
            _logger.error("%s: the device process has ended", self.device)
            holder = self._load_again()
        if holder is not None:
            holder.close()

    def _load_again(self) -> Channel | None:
        """The connection that holds the model; None if it is not wanted any more."""
        retry_s = RETRY_S
        while not self._closed.wait(retry_s):
            try:
                holder = self._load()
            except DeviceLostError as error:
                self.problem, retry_s = str(error), RETRY_S
            except Exception as error:
                self.problem = str(error) if isinstance(error, PtDeployError) else root_cause(error)
                retry_s = min(10 * retry_s, MAX_RETRY_S)
                _logger.error("%s: not loaded again: %s", self.device, self.problem)
            else:
                _logger.info("%s: the model was loaded again", self.device)
                return holder
        return None

    def _lose(self, problem: str) -> None:
        with self._lock:
            self.problem = problem
            self._generation += 1
            idle, self._idle = self._idle, []
            holder, self._holder = self._holder, None
        for channel in (*idle, *([holder] if holder else [])):
            channel.close()

    def _lost(self) -> DeviceLostError:
        return DeviceLostError(
            f"the process of {self.device} has ended and is started again; retry later"
        )

    def _kill(self) -> None:
        """End a process that is stopped."""
        _logger.error("%s: the device process does not answer; it is killed", self.device)
        with suppress(ProcessLookupError, PermissionError):
            os.kill(self.pid, signal.SIGKILL)


def device_names(processes: DeviceProcesses, device: str) -> list[str]:
    """The devices that a name means: all GPUs for ``cuda``.

    Raises:
        DeviceLostError: The process of the first one does not start.
    """
    if device != "cuda":
        return [device]
    channel = processes.connect("cuda:0")
    try:
        return [str(each) for each in _ask(channel, {"request": HELLO}).header["devices"]]
    except (OSError, EOFError) as error:
        raise DeviceLostError("the process of cuda:0 has ended; the log says why") from error
    finally:
        channel.close()


def _ask(channel: Channel, header: Mapping[str, Any], arrays: Arrays | None = None) -> Message:
    reply = _exchange(channel, header, arrays)
    raise_error(reply.header)
    return reply


def _exchange(
    channel: Channel,
    header: Mapping[str, Any],
    arrays: Arrays | None = None,
    timeout_s: float | None = None,
) -> Message:
    channel.set_timeout(timeout_s)
    channel.send(header, arrays)
    return channel.receive()
