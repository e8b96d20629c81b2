"""MLflow evaluator `pt_latency`: latency of single rows and throughput, with intervals.

    mlflow.models.evaluate(MODEL, DATA, targets="label", model_type="classifier",
                           evaluators=["default", "pt_latency"])

It times MLflow's `predict` in this process, so MLflow's own overhead is included. Imports neither
torch nor the rest of this package, because MLflow imports every registered evaluator.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.models.evaluation import EvaluationResult, ModelEvaluator
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

DEFAULTS = {"seconds": 2.0, "rows": 64, "batch_rows": 32}
"""Timing budget, most rows that are timed one at a time, and rows of a batch."""

_PERCENTILES = (50, 95, 99)


class LatencyEvaluator(ModelEvaluator):
    """Times a model that is evaluated."""

    @classmethod
    def can_evaluate(cls, *, model_type: str, evaluator_config: Any, **_: Any) -> bool:
        """Whether the evaluator was named.

        MLflow asks every registered evaluator if a user names none; then this one stays silent,
        since timing takes seconds.
        """
        return sys._getframe(1).f_code.co_name != "resolve_evaluators_and_configs"

    def evaluate(
        self, *, model: Any = None, dataset: Any, evaluator_config: Any = None, **_: Any
    ) -> EvaluationResult:
        """Time the model on rows of the data set.

        Args:
            model: The loaded model; static predictions cannot be timed.
            dataset: Its features are passed to `predict`.
            evaluator_config: Values for the keys of `DEFAULTS`.

        Raises:
            MlflowException: There is no model, no rows, or a key or value is invalid.
        """
        if model is None:
            raise _invalid("pt_latency times a model; give one instead of static predictions.")
        settings = _settings(evaluator_config or {})
        features = dataset.features_data
        if not len(features):
            raise _invalid("pt_latency: the data has no rows.")
        picked = np.random.default_rng(0).permutation(len(features))[: int(settings["rows"])]
        rows = [_take(features, [index]) for index in picked.tolist()]
        size = min(int(settings["batch_rows"]), len(features))
        batch = _take(features, picked[:size].tolist())
        singles_ms = [
            1e3 * seconds for seconds in _times(model.predict, rows, 0.6 * settings["seconds"])
        ]
        batches_s = _times(model.predict, [batch], 0.4 * settings["seconds"])
        metrics: dict[str, float] = {}
        for q in _PERCENTILES:
            value, low, high = _quantile(singles_ms, q / 100)
            name = f"latency_p{q}_ms"
            metrics |= {name: value, f"{name}_low": low, f"{name}_high": high}
        value, low, high = _quantile([len(batch) / seconds for seconds in batches_s], 0.5)
        metrics |= {
            "throughput_rows_per_s": value,
            "throughput_rows_per_s_low": low,
            "throughput_rows_per_s_high": high,
        }
        return EvaluationResult(metrics=metrics, artifacts={})


def _settings(config: dict[str, Any]) -> dict[str, float]:
    for key, value in config.items():
        if key not in DEFAULTS:
            raise _invalid(f"pt_latency: unknown key {key}; known are {', '.join(DEFAULTS)}.")
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise _invalid(f"pt_latency: {key} is {value!r}; give a number above 0.")
    return {**DEFAULTS, **config}


def _take(features: Any, indices: list[int]) -> Any:
    return features.iloc[indices] if hasattr(features, "iloc") else features[indices]


def _times(predict: Callable[[Any], Any], inputs: list[Any], seconds: float) -> list[float]:
    """Seconds of each call: every input once untimed, then in turn until the time is over."""
    for each in inputs:
        predict(each)
    found: list[float] = []
    until = time.monotonic() + seconds
    while time.monotonic() < until or len(found) < len(inputs):
        for each in inputs:
            start = time.perf_counter()
            predict(each)
            found.append(time.perf_counter() - start)
    return found


def _quantile(samples: list[float], q: float) -> tuple[float, float, float]:
    """A quantile with its distribution-free 95 % interval.

    Order statistics whose ranks are binomial quantiles (Conover, "Practical nonparametric
    statistics", 1999, section 3.2).
    """
    from scipy.stats import binom  # type: ignore[import-untyped]

    ordered = np.sort(np.asarray(samples))
    count = len(ordered)
    low, high = (int(binom.ppf(p, count, q)) for p in (0.025, 0.975))
    return (
        float(np.quantile(ordered, q)),
        float(ordered[max(low - 1, 0)]),
        float(ordered[min(high, count - 1)]),
    )


def _invalid(message: str) -> MlflowException:
    return MlflowException(message, error_code=INVALID_PARAMETER_VALUE)
