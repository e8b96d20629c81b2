"""Runs the batches of all workers on one device, several of them as one call of the model."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec

from mlflow_pt_deploy.artifacts import LoadedVariant
from mlflow_pt_deploy.errors import ServingError
from mlflow_pt_deploy.model_config import Limits
from mlflow_pt_deploy.runtimes.base import Inputs, Logits, pads_rows
from mlflow_pt_deploy.serving.batching.request import BatchShape
from mlflow_pt_deploy.system.device import CUDA, check_device, kind_of

Context = Callable[[], AbstractContextManager[object]]
"""Entered by a thread before it computes."""

CUDA_STREAMS = 2
"""Batches at a time on a GPU: one is copied while another is computed."""

# Padding tokens that saving one call is worth: a GPU takes about as long for a few rows as for one.
_PADDING = 64

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class HeldModel:
    """A model in the memory of the device process, with the limits of its batches."""

    loaded: LoadedVariant
    limits: Limits


@dataclass(frozen=True, eq=False)
class Job:
    """One batch of one worker; `done` gets its logits or its error."""

    model: HeldModel
    inputs: Inputs
    done: queue.SimpleQueue[Logits | Exception] = field(default_factory=queue.SimpleQueue)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(next(iter(self.inputs.values())))

    @property
    def shape(self) -> BatchShape:
        """Its shape; its own padding counts as tokens, an image as one token."""
        longest = self.inputs["input_ids"].shape[1] if "input_ids" in self.inputs else 1
        return BatchShape(self.rows, longest, self.rows * longest)


def next_jobs(waiting: Sequence[Job]) -> list[Job]:
    """The oldest job, and the younger ones that are computed with it, in their order."""
    first = waiting[0]
    taken, shape = [first], first.shape
    padding = _PADDING if pads_rows(first.model.loaded.predict) else None
    for job in waiting[1:]:
        if job.model is not first.model:
            continue
        wider = shape.plus(job.shape)
        if wider.fits(first.model.limits, padding, first.model.limits.max_batch_rows):
            taken.append(job)
            shape = wider
    return taken


def device_context(device: str) -> AbstractContextManager[object]:
    """Makes a GPU PyTorch's current one, so that a thread allocates nothing on the first GPU.

    Raises:
        UnsupportedError: PyTorch cannot use it.
    """
    if kind_of(device) != CUDA or not _has_torch():
        return nullcontext()
    import torch

    check_device(device)
    return torch.cuda.device(device)


def stream_contexts(device: str) -> list[Context]:
    """What the threads of a device enter: on a GPU each a CUDA stream of its own."""
    if kind_of(device) != CUDA or not _has_torch():
        return [nullcontext]
    import torch

    def enter() -> AbstractContextManager[object]:
        stack = ExitStack()
        stack.enter_context(torch.cuda.device(device))
        stack.enter_context(torch.cuda.stream(torch.cuda.Stream(device)))
        return stack

    return [enter] * CUDA_STREAMS


def _has_torch() -> bool:
    """Whether PyTorch is installed; ONNX Runtime alone has streams of its own."""
    return find_spec("torch") is not None


class DeviceExecutor:
    """Threads that compute, one for each context; the first `run` starts them.

    Jobs of the same model that wait at the same time are one call, within the model's limits. If
    that call fails each job is computed alone, so a worker never gets an error of another's rows.

    Args:
        contexts: See `stream_contexts`.
    """

    def __init__(self, contexts: Sequence[Context]) -> None:
        self._contexts = contexts
        self._arrived = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._started: dict[int, float] = {}  # by thread
        self._threads: list[threading.Thread] = []

    @property
    def running_s(self) -> float:
        """Seconds since the oldest running call began; 0 if none is running."""
        started = min(list(self._started.values()), default=None)
        return 0.0 if started is None else time.monotonic() - started

    def run(self, model: HeldModel, inputs: Inputs) -> Logits:
        """Compute a batch; blocks until it is done.

        Returns:
            float32 (rows, classes).

        Raises:
            Exception: An error of the model.
        """
        job = Job(model, inputs)
        with self._arrived:
            self._start_threads()
            self._waiting.append(job)
            self._arrived.notify()
        result = job.done.get()
        if isinstance(result, Exception):
            raise result
        return result

    def _start_threads(self) -> None:
        while len(self._threads) < len(self._contexts):
            enter = self._contexts[len(self._threads)]
            thread = threading.Thread(target=self._work, args=(enter,), name="device", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _work(self, enter: Context) -> None:
        try:
            with enter():
                while True:
                    self._run_together(self._next_jobs())
        except BaseException:
            _logger.exception("the device process ends")
            os._exit(1)

    def _next_jobs(self) -> list[Job]:
        with self._arrived:
            while not self._waiting:
                self._arrived.wait()
            jobs = next_jobs(list(self._waiting))
            for job in jobs:
                self._waiting.remove(job)
        return jobs

    def _run_together(self, jobs: Sequence[Job]) -> None:
        try:
            results = self._compute(jobs)
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].done.put(error)
                return
            for job in jobs:
                self._run_together([job])
            return
        for job, result in zip(jobs, results, strict=True):
            job.done.put(result)

    def _compute(self, jobs: Sequence[Job]) -> list[Logits]:
        loaded = jobs[0].model.loaded
        inputs = jobs[0].inputs
        if len(jobs) > 1:
            inputs = loaded.preprocessor.join([job.inputs for job in jobs])
        thread = threading.get_ident()
        self._started[thread] = time.monotonic()
        try:
            logits = loaded.predict(inputs)
        finally:
            del self._started[thread]
        rows = sum(job.rows for job in jobs)
        if len(logits) != rows:
            raise ServingError(f"the model returned {len(logits)} rows for {rows}")
        results, start = [], 0
        for job in jobs:
            results.append(logits[start : start + job.rows])
            start += job.rows
        return results
