"""How fast, how large and how right a variant is, measured on this machine.

Knows variants' folders and data; does not know MLflow, nor who chooses what from the numbers.

    result      a number with its unit and evidence; all numbers of one variant
    statistics  percentiles, intervals, macro-F1: pure functions
    chance      whether a classifier is better than a constant one: pure too
    worker      the fresh process that loads one variant and runs it
    process     the handle on a worker
    timing      interleaved rounds against the baseline
    evaluate    the straight line through all of them: `Bench`, `measure`

Names are loaded on first use: a worker imports this package too, and what it imports counts
towards the memory and the start-up time of the variant that it measures.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow_pt_deploy.measure.evaluate import Bench, measure
    from mlflow_pt_deploy.measure.process import Worker
    from mlflow_pt_deploy.measure.result import UNITS, Measurement, Result

__all__ = ["UNITS", "Bench", "Measurement", "Result", "Worker", "measure"]

_HOME = {
    "UNITS": "result",
    "Bench": "evaluate",
    "Measurement": "result",
    "Result": "result",
    "Worker": "process",
    "measure": "evaluate",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
