"""Measure speed, size and accuracy of variants on this machine.

    result         one measurement with unit and samples; all measurements of one variant
    statistics     percentiles, confidence intervals, macro-F1
    profile        what a version answers, as counts
    drift          whether served rows still look like a profile
    chance         compare a classifier with a constant one
    worker         process that loads one variant and runs it
    worker_client  handle of a worker process
    timing         interleaved rounds against the baseline
    baseline       a warm baseline process, one per device
    quality        accuracy, agreement, calibration
    gpu_state      clocks, power and processes of a GPU, as nvidia-smi says
    on_gpu         device time, device memory and state of a GPU
    one_variant    all measurements of one variant
    bench          `Bench` and `measure`: several variants, one after the other

Names are loaded lazily: a worker process imports this package too, and every import counts
towards the memory and the start-up time of the measured variant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow_pt_deploy.evaluation.bench import Bench, measure
    from mlflow_pt_deploy.evaluation.result import UNITS, Measurement, Result
    from mlflow_pt_deploy.evaluation.worker_client import Worker

__all__ = ["UNITS", "Bench", "Measurement", "Result", "Worker", "measure"]

_MODULES = {
    "UNITS": "result",
    "Bench": "bench",
    "Measurement": "result",
    "Result": "result",
    "Worker": "worker_client",
    "measure": "bench",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
