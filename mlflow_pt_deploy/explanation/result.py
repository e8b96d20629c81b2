"""What an explanation says, and its form in JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mlflow_pt_deploy.explanation.words import Word

_DIGITS = 6


def above_mean(logits: Any, label: int) -> Any:
    """The logit of a label above the mean of all labels' logits.

    This is what is explained. Softmax does not depend on what all logits have in common, so a word
    that raises all of them has no share in the label.

    Args:
        logits: An array or tensor (..., labels).
        label: Index of the label.
    """
    return logits[..., label] - logits.mean(-1)


@dataclass(frozen=True)
class Attribution:
    """A logit as a sum over parts of a text.

    Attributes:
        method: How it was computed.
        logit: The explained logit, see `above_mean`.
        base: What belongs to no part.
        parts: Parts of the text.
        values: The share of each part.
    """

    method: str
    logit: float
    base: float
    parts: Sequence[Word]
    values: npt.NDArray[np.floating[Any]]

    @property
    def delta(self) -> float:
        """What `base` and `values` leave of the logit."""
        return self.logit - self.base - float(self.values.sum())

    def to_json(self, label: str, *, truncated: bool) -> dict[str, Any]:
        """The explanation of a prediction, numbers to six places.

        Args:
            label: The explained label.
            truncated: Whether the model read only a part of the text.
        """
        return {
            "method": self.method,
            "label": label,
            "logit": _rounded(self.logit),
            "base": _rounded(self.base),
            "delta": _rounded(self.delta),
            "truncated": truncated,
            "contributions": [
                {"start": part.start, "end": part.end, "value": _rounded(value)}
                for part, value in zip(self.parts, self.values.tolist(), strict=True)
            ],
        }


def _rounded(value: float) -> float:
    return round(value, _DIGITS) + 0.0  # without the sign of a zero
