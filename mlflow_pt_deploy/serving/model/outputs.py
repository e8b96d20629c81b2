"""Converts logits to predictions: labels with probabilities, as objects or as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mlflow_pt_deploy.errors import RequestError, ServingError
from mlflow_pt_deploy.runtimes.base import Logits


class Predictions(list[Any]):
    """A list of ``{"label", "score"}``, one per row, that converts to an array of labels.

    MLflow's evaluators of classifiers convert the result of `predict` to an array and compare it
    with the column of targets. Other code sees a list of dicts.

    Args:
        predictions: One per row.
        values: Value of each label in an array.
    """

    def __init__(self, predictions: Iterable[Any], values: Mapping[str, Any]) -> None:
        super().__init__(predictions)
        self._values = values

    def __array__(
        self, dtype: npt.DTypeLike | None = None, copy: bool | None = None
    ) -> npt.NDArray[Any]:
        """The labels, shape (rows,)."""
        return np.array([self._values[each["label"]] for each in self], dtype=dtype)


def _as_pandas_reads(names: Sequence[str]) -> Sequence[Any]:
    """Integers or booleans if all labels are such, as pandas reads them from a CSV file."""
    words = {"true": True, "false": False}
    if all(name.removeprefix("-").isdecimal() and str(int(name)) == name for name in names):
        return [int(name) for name in names]
    if all(name.lower() in words for name in names):
        return [words[name.lower()] for name in names]
    return names


class PredictionFormatter:
    """Formats logits as predictions.

    Args:
        names: Names of the classes, in the order of the logits.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._values = dict(zip(names, _as_pandas_reads(names), strict=True))
        self._starts = [f'{{"label": {json.dumps(name)}, "score": ' for name in names]

    def top_k(self, params: Mapping[str, Any] | None) -> int:
        """Labels per row that a request wants; 1 by default.

        Raises:
            RequestError: It is not a number of classes.
        """
        wanted = (params or {}).get("top_k")
        if wanted is None:
            return 1
        classes = len(self._names)
        whole = isinstance(wanted, (int, np.integer)) and not isinstance(wanted, bool)
        if not whole or not 1 <= wanted <= classes:
            raise RequestError(f"'top_k' must be a whole number from 1 to {classes}")
        return int(wanted)

    def to_objects(self, logits: Logits, top_k: int = 1) -> list[Any]:
        """Labels and softmax probabilities to six places.

        Args:
            logits: float32 (rows, classes).
            top_k: Labels per row.

        Returns:
            A ``{"label", "score"}`` per row; with `top_k` above 1 a list of them per row, in
            descending order.

        Raises:
            ServingError: The logits hold NaN or infinity.
        """
        names = self._names
        if top_k == 1:
            return [{"label": names[at], "score": score} for at, score in self.best(logits)]
        exponent = _exponent(logits)
        scores = exponent / exponent.sum(axis=1, keepdims=True)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
        return [
            [{"label": names[at], "score": round(float(row[at]), 6)} for at in order]
            for row, order in zip(scores, best.tolist(), strict=True)
        ]

    def as_predictions(self, objects: Iterable[Any]) -> Predictions:
        """Wrap objects with one label each for MLflow's evaluators."""
        return Predictions(objects, self._values)

    def best(self, logits: Logits) -> list[tuple[int, float]]:
        """The best class of each row, and its probability to six places.

        Raises:
            ServingError: See `to_objects`.
        """
        scores = (1 / _exponent(logits).sum(axis=1)).round(6)
        return list(zip(logits.argmax(axis=1).tolist(), scores.tolist(), strict=True))

    def to_json(self, best: Iterable[tuple[int, float]]) -> list[str]:
        """The output of `best` as JSON, built without objects."""
        starts = self._starts
        return [f"{starts[at]}{score!r}}}" for at, score in best]


def best_label(text: str) -> str:
    """The best label of a prediction as JSON, which is a list if several labels were asked for."""
    found = json.loads(text)
    label: str = (found[0] if isinstance(found, list) else found)["label"]
    return label


def _exponent(logits: Logits) -> npt.NDArray[np.float64]:
    """Numerators of the softmax, scaled so that the largest of each row is 1."""
    if not np.isfinite(logits).all():
        raise ServingError("the model's logits are not finite")
    above = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    exponent: npt.NDArray[np.float64] = np.exp(above)
    return exponent
