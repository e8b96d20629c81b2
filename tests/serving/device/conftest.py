"""Processes of a device, with the CPU in place of a GPU."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from mlflow_pt_deploy.model_config import ServingOptions
from mlflow_pt_deploy.serving.device.model_store import ModelKey
from mlflow_pt_deploy.serving.device.processes import DeviceProcesses
from mlflow_pt_deploy.serving.worker_state import WorkerStates

VARIANT = Path(__file__).parents[2] / "fixtures" / "saved-by-0.1.0" / "variant"
"""A static student in NumPy."""

OPTIONS = ServingOptions(device="cpu")


def key_of(digest: str) -> ModelKey:
    return ModelKey(digest, False, 0, 32, 2048)


@pytest.fixture(scope="module")
def new_processes(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[], DeviceProcesses]]:
    """Makes a run directory; what was started in it ends with the module."""
    made: list[DeviceProcesses] = []

    def new() -> DeviceProcesses:
        states = WorkerStates(tmp_path_factory.mktemp("run"), 2)
        made.append(DeviceProcesses(states, os.getpid(), 60.0, "text"))
        return made[-1]

    yield new
    for processes in made:
        for child in processes._children:
            with suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGKILL)
            child.wait()


@pytest.fixture(scope="module")
def processes(new_processes: Callable[[], DeviceProcesses]) -> DeviceProcesses:
    return new_processes()
