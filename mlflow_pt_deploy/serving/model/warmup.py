"""What a model meets before its first callers do, so that they do not pay for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from statistics import median

from mlflow_pt_deploy.runtimes.base import Inputs, Predict

FEW = (1, 2, 3, 4)
"""Rows of small batches."""

_SHORT = 32
_MOST_S = 1.0
# Of how many shapes it is seen whether a new one costs more, and how much more.
_PROBES = 8
_DEAR = 1.3


def warm_up_shapes(models: Sequence[Predict], batch: Inputs, most_s: float = _MOST_S) -> int:
    """Have models meet small batches of short texts, the smallest first.

    Some runtimes prepare themselves for each shape anew, which takes as long as one to three such
    batches; those that do not are left alone after the first few.

    Args:
        models: What predicts; of a cascade both, since the strong one may not be asked otherwise.
        batch: Named arrays of as many rows as `FEW` goes up to, axis 1 their length.
        most_s: Seconds after which no other shape is begun.

    Returns:
        How many shapes were met.
    """
    until = time.monotonic() + most_s
    first_s: list[float] = []
    again_s: list[float] = []
    met = 0
    for rows, length in product(FEW, range(1, _SHORT + 1)):
        if time.monotonic() > until or (
            met == _PROBES and median(first_s) < _DEAR * median(again_s)
        ):
            break
        inputs = {name: array[:rows, :length] for name, array in batch.items()}
        ask = partial(_ask, models, inputs)
        took_s = _seconds(ask)
        if met < _PROBES:
            first_s.append(took_s)
            again_s.append(_seconds(ask))
        met += 1
    return met


def fastest_s(act: Callable[[], object]) -> float:
    """Seconds of the fastest of a few calls."""
    return min(_seconds(act) for _ in range(5))


def _ask(models: Sequence[Predict], inputs: Inputs) -> None:
    for model in models:
        model(inputs)


def _seconds(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start
