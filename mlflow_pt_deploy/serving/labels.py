"""From logits to the answer: labels with their probabilities, as objects or as JSON.

Knows nothing of batches and callers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mlflow_pt_deploy.errors import RequestError, ServingError
from mlflow_pt_deploy.variants.base import Logits


class Predictions(list[Any]):
    """The answers to rows, a ``{"label", "score"}`` each; as an array, the labels alone.

    MLflow's evaluators of classifiers turn what `predict` returns into an array and compare it with
    the column of targets. Everything else sees a list of dicts.

    Args:
        answers: One a row.
        values: What stands for each label in an array.
    """

    def __init__(self, answers: Iterable[Any], values: Mapping[str, Any]) -> None:
        super().__init__(answers)
        self._values = values

    def __array__(
        self, dtype: npt.DTypeLike | None = None, copy: bool | None = None
    ) -> npt.NDArray[Any]:
        """The labels, shape (rows,)."""
        return np.array([self._values[answer["label"]] for answer in self], dtype=dtype)


def _as_pandas_reads(names: Sequence[str]) -> Sequence[Any]:
    """Whole numbers or truth values for labels that are nothing else, as in a table read anew."""
    words = {"true": True, "false": False}
    if all(name.removeprefix("-").isdecimal() and str(int(name)) == name for name in names):
        return [int(name) for name in names]
    if all(name.lower() in words for name in names):
        return [words[name.lower()] for name in names]
    return names


class Labels:
    """Names of the classes, in the order of the logits."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._values = dict(zip(names, _as_pandas_reads(names), strict=True))
        self._starts = [f'{{"label": {json.dumps(name)}, "score": ' for name in names]

    def top_k(self, params: Mapping[str, Any] | None) -> int:
        """How many labels a request wants for each row; 1 where it does not say.

        Raises:
            RequestError: Not a whole number of classes.
        """
        wanted = (params or {}).get("top_k")
        if wanted is None:
            return 1
        classes = len(self._names)
        whole = isinstance(wanted, (int, np.integer)) and not isinstance(wanted, bool)
        if not whole or not 1 <= wanted <= classes:
            raise RequestError(f"'top_k' must be a whole number from 1 to {classes}")
        return int(wanted)

    def read(self, logits: Logits, top_k: int = 1) -> list[Any]:
        """Labels and softmax probabilities to six places.

        Args:
            logits: float32 (rows, classes).
            top_k: How many a row.

        Returns:
            A ``{"label", "score"}`` per row; with `top_k` above 1 a list of them per row, the best
            first.

        Raises:
            ServingError: The model's answer holds NaN or infinity.
        """
        names = self._names
        if top_k == 1:
            return [{"label": names[at], "score": score} for at, score in _best(logits)]
        exponent = _exponent(logits)
        scores = exponent / exponent.sum(axis=1, keepdims=True)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
        return [
            [{"label": names[at], "score": round(float(row[at]), 6)} for at in order]
            for row, order in zip(scores, best.tolist(), strict=True)
        ]

    def as_predictions(self, answers: Iterable[Any]) -> Predictions:
        """Answers with one label each as what MLflow's evaluators understand too."""
        return Predictions(answers, self._values)

    def write(self, logits: Logits) -> list[str]:
        """The answer to each row as JSON: what `read` says, without objects.

        Raises:
            ServingError: As for `read`.
        """
        starts = self._starts
        return [f"{starts[at]}{score!r}}}" for at, score in _best(logits)]


def _exponent(logits: Logits) -> npt.NDArray[np.float64]:
    """Of each row the softmax's numerators; that of its largest logit is 1."""
    if not np.isfinite(logits).all():
        raise ServingError("the model's logits are not finite")
    above = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    exponent: npt.NDArray[np.float64] = np.exp(above)
    return exponent


def _best(logits: Logits) -> Iterable[tuple[int, float]]:
    """The best class of each row, and its probability to six places."""
    scores = 1 / _exponent(logits).sum(axis=1)
    return zip(logits.argmax(axis=1).tolist(), (round(s, 6) for s in scores.tolist()), strict=True)
