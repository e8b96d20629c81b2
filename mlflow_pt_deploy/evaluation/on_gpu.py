"""What is measured of a variant on a GPU only: device time, device memory, state of the GPU."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Collection, Sequence
from dataclasses import replace
from statistics import median
from time import perf_counter

from mlflow_pt_deploy.evaluation.gpu_state import (
    GpuState,
    gpu_processes,
    gpu_state,
    gpu_warnings,
    parse_state,
    state_commands,
)
from mlflow_pt_deploy.evaluation.quality import measurement
from mlflow_pt_deploy.evaluation.result import Measurement, Result
from mlflow_pt_deploy.evaluation.timing import at_least
from mlflow_pt_deploy.evaluation.worker_client import Worker

_LONGEST_LOAD_S = 20.0


def gpu_measurements(
    worker: Worker, timed: Sequence[int], batched: Sequence[int], size: int, uuid: str
) -> list[Measurement]:
    """Measure device time and memory; what the runtime or nvidia-smi does not tell is absent.

    Args:
        worker: A warm variant on a GPU.
        timed: Rows of the device time.
        batched: Rows of the batches.
        size: Rows of a batch.
        uuid: The GPU; empty: not known.
    """
    found = []
    if elapsed := worker.device_time(timed):
        found.append(measurement("device_ms", median(elapsed) / 1e6))
    rows = at_least(batched, size)
    memory = worker.device_memory(rows, size) or gpu_processes(uuid).get(worker.pid)
    if memory:
        found.append(measurement("peak_device_mb", memory / 1e6))
    if tokens := worker.tokens_of(rows, size):
        found.append(measurement("best_batch_tokens", tokens))
    return found


class GpuWatch:
    """Notes the state of a GPU before a variant is timed, and under load afterwards.

    Nothing is asked while a variant is timed.

    Args:
        uuid: The GPU; empty: not known, and nothing is noted.
    """

    def __init__(self, uuid: str) -> None:
        self._uuid = uuid
        self.before = gpu_state(uuid)

    def finish(
        self, result: Result, worker: Worker, rows: Sequence[int], own: Collection[int]
    ) -> Result:
        """Add the states to a result, and warnings to its notes.

        Args:
            result: Of the variant.
            worker: Its process, which is given batches meanwhile.
            rows: Rows of the batches.
            own: Processes that may be on the GPU beside the variant.
        """
        if self.before == GpuState():
            return result
        size = int(result.value("best_batch_rows") or 1)
        loaded = self._under_load(worker, at_least(rows, size), size)
        processes = {worker.pid, os.getpid(), *own}
        warnings = gpu_warnings(loaded, gpu_processes(self._uuid), processes)
        text = f"before: {self.before.describe()}; under load: {loaded.describe()}"
        return replace(result, notes=(*result.notes, *warnings), gpu=text)

    def _under_load(self, worker: Worker, rows: Sequence[int], size: int) -> GpuState:
        end = perf_counter() + _LONGEST_LOAD_S
        asked = [
            subprocess.Popen(each, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            for each in state_commands(self._uuid)
        ]
        try:
            while any(each.poll() is None for each in asked) and perf_counter() < end:
                worker.batch(rows, size)
        finally:
            for each in asked:
                each.kill()
            outputs = [each.communicate()[0] for each in asked]
        succeeded = [
            output if each.returncode == 0 else ""
            for each, output in zip(asked, outputs, strict=True)
        ]
        return parse_state(succeeded)
