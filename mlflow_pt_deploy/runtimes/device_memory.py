"""Out of memory on a device: a batch is computed in smaller parts until it fits again.

`BatchLimit` decides how large a call may be, `DeviceMemoryGuard` calls the model. The size of a
call is its tokens with padding; for images it is their number.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from mlflow_pt_deploy.errors import DeviceMemoryError
from mlflow_pt_deploy.runtimes.base import Inputs, Logits, Predict, trim_padding
from mlflow_pt_deploy.system.device import (
    failed_allocations,
    is_out_of_memory,
    release_cached_memory,
)

PAUSE_S, MAX_PAUSE_S = 5.0, 600.0
"""Seconds after which a larger call is tried again; doubled each time that it fails soon."""

CALLS = 16
"""Calls that must succeed before that."""

_ROW_TOO_LARGE = (
    "a row needs more memory than is free on the device; retry later, or send a shorter row"
)
_logger = logging.getLogger(__name__)


class DeviceMemory(NamedTuple):
    """What happened to the memory of a device.

    Attributes:
        batch_limit: Largest call, in tokens with padding or in images; 0: no limit.
        out_of_memory: How often a call found no memory.
    """

    batch_limit: int
    out_of_memory: int


class PartialBatchError(DeviceMemoryError):
    """Some rows of a batch need more memory than is free; the logits of the rest are kept.

    Args:
        message: For the client.
        rows: Indices of these rows.
        logits: float32 (rows, classes), NaN in these rows; None if no row was computed.
    """

    def __init__(
        self, message: str, rows: frozenset[int] = frozenset(), logits: Logits | None = None
    ) -> None:
        super().__init__(message)  # pickled with its attributes
        self.rows = rows
        self.logits = logits


class BatchLimit:
    """Decides how large a call may be, by what failed and when; not thread-safe.

    The limit is half of what failed. After a pause and some calls it is doubled, until it is above
    all that failed; then there is none.

    Attributes:
        size: Largest call; 0: no limit.
    """

    def __init__(self) -> None:
        self.size = 0
        self._largest_failed = 0
        self._calls = 0
        self._changed_at = 0.0
        self._pause_s = PAUSE_S
        self._raised = False

    def rows(self, row_size: int) -> float:
        """Most rows of `row_size` in a call, at least one."""
        return max(1, self.size // row_size) if self.size else math.inf

    def failed(self, size: int, now: float) -> None:
        """Lower the limit after a call of several rows, `size` in all, found no memory."""
        self._largest_failed = max(self._largest_failed, size)
        half = max(1, size // 2)
        if self.size and self.size <= half:  # a concurrent call failed before
            return
        if self._raised:
            soon = now - self._changed_at < 2 * self._pause_s
            self._pause_s = min(2 * self._pause_s, MAX_PAUSE_S) if soon else PAUSE_S
        self._change(half, now, raised=False)

    def succeeded(self, now: float) -> None:
        """Raise the limit if that is worth a try after a call that succeeded."""
        if not self.size:
            return
        self._calls += 1
        if self._calls < CALLS or now - self._changed_at < self._pause_s:
            return
        size = 2 * self.size
        if size > self._largest_failed:
            size = self._largest_failed = 0
        self._change(size, now, raised=True)

    def _change(self, size: int, now: float, *, raised: bool) -> None:
        self.size, self._changed_at, self._calls, self._raised = size, now, 0, raised


class DeviceMemoryGuard:
    """A `Predict` that computes a batch in parts if the device has no memory for all of it.

    Safe for concurrent calls if the model is. Other attributes are those of the model.

    Args:
        predict: The model.
        name: Model and device, for the log.
        device: The device.
        clock: Seconds.
    """

    def __init__(
        self,
        predict: Predict,
        name: str,
        device: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.guarded = predict
        self._name = name
        self._device = device
        self._clock = clock
        self._limit = BatchLimit()
        self._lock = threading.Lock()
        self._logged_size = 0
        self._logged_row = False
        self._events = 0
        self._failed_allocations = failed_allocations(device)

    def __getattr__(self, name: str) -> Any:
        if name == "guarded":  # before `__init__`
            raise AttributeError(name)
        return getattr(self.guarded, name)

    @property
    def memory(self) -> DeviceMemory:
        """What happened so far."""
        return DeviceMemory(self._limit.size, self._events)

    def __call__(self, inputs: Inputs) -> Logits:
        """Compute a batch.

        Raises:
            PartialBatchError: Rows do not fit even alone.
        """
        count = _rows(inputs)
        row_size = max(1, _size(inputs) // count)
        done: list[tuple[int, Logits]] = []
        failed: list[int] = []
        start, most, hopeless = 0, float(count), math.inf
        while start < count:
            rows = int(min(count - start, most, self._limit.rows(row_size)))
            part = inputs if rows == count else _part(inputs, start, rows)
            logits = None
            if rows > 1 or _size(part) < hopeless:
                logits = self._attempt(part)
            if logits is not None:
                done.append((start, logits))
            elif rows > 1:
                most = rows // 2
                continue
            else:  # longer rows would fail too
                hopeless = min(hopeless, _size(part))
                failed.append(start)
            start += rows
        self._log(bool(failed))
        return _joined(count, done, failed)

    def _attempt(self, inputs: Inputs) -> Logits | None:
        """Compute once; None if there was no memory."""
        try:
            logits = self.guarded(inputs)
        except Exception as error:
            if not self._is_full(error):
                raise
        else:
            if self._limit.size:
                with self._lock:
                    self._limit.succeeded(self._clock())
            return logits
        # not within `except`: the frames of the error hold tensors
        release_cached_memory()
        with self._lock:
            self._events += 1
            if _rows(inputs) > 1:
                self._limit.failed(_size(inputs), self._clock())
        return None

    def _is_full(self, error: Exception) -> bool:
        """Whether an error is one of memory, also where the runtime does not say so."""
        before, self._failed_allocations = (
            self._failed_allocations,
            failed_allocations(self._device),
        )
        hidden = hides_reason(error) and self._failed_allocations > before
        return hidden or was_out_of_memory(error)

    def _log(self, row_failed: bool) -> None:
        """Log a change of the limit, and the first row that does not fit."""
        size = self._limit.size
        if size != self._logged_size:
            with self._lock:
                before, self._logged_size = self._logged_size, size
            if not size:
                _logger.info("%s: batches of any size fit again", self._name)
            elif not before or size < before:
                _logger.warning(
                    "%s: out of memory; now at most %d tokens or images a call", self._name, size
                )
            else:
                _logger.info("%s: now at most %d tokens or images a call", self._name, size)
        if row_failed and not self._logged_row:
            self._logged_row = True
            _logger.warning(
                "%s: out of memory for a single row; such rows are rejected", self._name
            )


def memory_of(predict: Predict) -> DeviceMemory | None:
    """The state of a model, or of all stages of a cascade; None on a device without a guard."""
    found = [
        memory
        for each in getattr(predict, "models", (predict,))
        if (memory := getattr(each, "memory", None)) is not None
    ]
    if not found:
        return None
    limits = [memory.batch_limit for memory in found if memory.batch_limit]
    return DeviceMemory(min(limits, default=0), sum(memory.out_of_memory for memory in found))


def unguarded(predict: Predict) -> Predict:
    """The model itself."""
    return predict.guarded if isinstance(predict, DeviceMemoryGuard) else predict


def hides_reason(error: BaseException) -> bool:
    """Whether an error is one of AOTInductor's, whose reason is only on standard error."""
    return isinstance(error, RuntimeError) and "API call failed" in str(error)


def was_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that it followed from, says that a device has no memory."""
    seen: BaseException | None = error
    while seen is not None:
        if is_out_of_memory(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _rows(inputs: Inputs) -> int:
    return len(next(iter(inputs.values())))


def _size(inputs: Inputs) -> int:
    """Tokens with padding, or number of images."""
    array = next(iter(inputs.values()))
    return int(array.size) if array.ndim == 2 else len(array)


def _part(inputs: Inputs, start: int, rows: int) -> Inputs:
    return trim_padding({name: array[start : start + rows] for name, array in inputs.items()})


def _joined(count: int, done: list[tuple[int, Logits]], failed: list[int]) -> Logits:
    """The logits of a batch from its parts.

    Raises:
        PartialBatchError: Rows failed.
    """
    if not done:
        raise PartialBatchError(_ROW_TOO_LARGE, frozenset(failed))
    if len(done) == 1 and not failed:
        return done[0][1]
    logits = np.full((count, done[0][1].shape[1]), np.nan, dtype=np.float32)
    for start, part in done:
        logits[start : start + len(part)] = part
    if failed:
        raise PartialBatchError(_ROW_TOO_LARGE, frozenset(failed), logits)
    return logits
