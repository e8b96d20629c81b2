"""Warm-up: runs a model on common shapes before the first requests."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from statistics import median

from mlflow_pt_deploy.model_config import Limits
from mlflow_pt_deploy.preprocessing import Preprocessor
from mlflow_pt_deploy.runtimes.base import Inputs, Predict

FEW = (1, 2, 3, 4)
"""Row counts of small batches."""

_MAX_LENGTH = 32
_MAX_S = 1.0
# The first shapes are timed twice. Warm-up ends if their first runs took less than this ratio of
# their second runs, in CPU time: on a busy machine the wall time is mostly waiting.
_PROBES = 8
_SLOW_RATIO = 1.3


def warm_up_buckets(models: Sequence[Predict], limits: Limits, preprocessor: Preprocessor) -> None:
    """Let models that compute in buckets of shapes prepare those that their batches need.

    Args:
        models: The models; one with buckets has ``warm_up_buckets(rows, tokens, longest)``.
        limits: Of a batch.
        preprocessor: Tells the longest row; an image counts as its tokens.
    """
    for model in models:
        prepare = getattr(model, "warm_up_buckets", None)
        if prepare is not None:
            axes = next(iter(preprocessor.axes.values()))
            sample = preprocessor.warmup_rows()[-1]
            longest = axes[1].maximum if 1 in axes else preprocessor.token_count(sample)
            prepare(limits.max_batch_rows, limits.max_batch_tokens, longest)


def warm_up_shapes(models: Sequence[Predict], batch: Inputs, max_s: float = _MAX_S) -> int:
    """Run models on small batches of short texts, the smallest first.

    Some runtimes prepare themselves for each new shape, which takes as long as one to three
    batches. For other runtimes this stops after the first few shapes.

    Args:
        models: The models; for a cascade both stages.
        batch: Named arrays (max(FEW), length).
        max_s: Seconds after which no other shape is begun.

    Returns:
        Number of shapes that were run.
    """
    until = time.monotonic() + max_s
    first_s: list[float] = []
    again_s: list[float] = []
    count = 0
    for rows, length in product(FEW, range(1, _MAX_LENGTH + 1)):
        if time.monotonic() > until or (
            count == _PROBES and median(first_s) < _SLOW_RATIO * median(again_s)
        ):
            break
        inputs = {name: array[:rows, :length] for name, array in batch.items()}
        run = partial(_run, models, inputs)
        took_s = _cpu_s(run)
        if count < _PROBES:
            first_s.append(took_s)
            again_s.append(_cpu_s(run))
        count += 1
    return count


def fastest_s(act: Callable[[], object]) -> float:
    """Seconds of the fastest of five calls."""
    return min(_seconds(act) for _ in range(5))


def _run(models: Sequence[Predict], inputs: Inputs) -> None:
    for model in models:
        model(inputs)


def _seconds(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def _cpu_s(act: Callable[[], object]) -> float:
    start = time.process_time()
    act()
    return time.process_time() - start
