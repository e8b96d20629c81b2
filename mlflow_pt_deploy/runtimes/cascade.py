"""Cascade: a fast model, and a strong model for the rows of which the fast one is not confident.

Both are complete variants in the subfolders ``fast`` and ``strong``. Confidence is the largest
softmax probability (Hendrycks & Gimpel 2017; as a cascade: Wang et al. 2022).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt

from mlflow_pt_deploy.errors import VariantError
from mlflow_pt_deploy.runtimes.base import (
    Inputs,
    Logits,
    Predict,
    Variant,
    confidence,
    pads_rows,
    trim_padding,
)

if TYPE_CHECKING:
    from mlflow_pt_deploy.models import Classifier

CASCADE = "cascade"
"""First part of a cascade's name, in place of a model's name."""

FAST, STRONG = "fast", "strong"
"""Subfolders of the two stages."""


@dataclass(frozen=True)
class Cascade(Variant):
    """Two variants and the confidence threshold between them.

    Attributes:
        threshold: Rows with a lower confidence of the fast model go to the strong one, 0 to 1.
        fast, strong: Names of the two variants.
        flags: CPU flags that either variant requires.
        trusted: True if either variant carries code.
    """

    precision: str = "mixed"
    threshold: float = 0.5
    fast: str = ""
    strong: str = ""
    flags: tuple[str, ...] = ()
    trusted: bool = False

    runtime: ClassVar[str] = "cascade"
    stages: ClassVar[tuple[str, ...]] = (FAST, STRONG)

    @property
    def allows_code(self) -> bool:
        return self.trusted

    def name(self, model: str) -> str:
        """``cascade-<fast model>-<strong model>``."""
        return f"{model}-{self.fast.partition('-')[0]}-{self.strong.partition('-')[0]}"

    def required_cpu_flags(self) -> frozenset[str]:
        return frozenset(self.flags)

    def export(
        self, module: Classifier, example: Inputs, calibration: Sequence[Inputs], folder: Path
    ) -> None:
        raise VariantError("a cascade is written from two exported variants; use write_cascade.")

    def load(self, folder: Path, *, device: str, threads: int) -> Predict:
        raise VariantError("a cascade is loaded by its stages; use load_variant.")

    def combine(self, predictors: Sequence[Predict]) -> Predict:
        fast, strong = predictors
        return CascadePredictor(fast, strong, self.threshold)


class CascadePredictor:
    """A loaded cascade.

    Args:
        fast, strong: Predictors of the two variants.
        threshold: See `Cascade`.

    Attributes:
        pads: Whether either predictor pads rows.
    """

    def __init__(self, fast: Predict, strong: Predict, threshold: float) -> None:
        self._fast, self._strong, self._threshold = fast, strong, threshold
        self.pads = pads_rows(fast) or pads_rows(strong)

    @property
    def models(self) -> tuple[Predict, Predict]:
        """The fast and the strong predictor."""
        return self._fast, self._strong

    def __call__(self, inputs: Inputs) -> Logits:
        logits, unsure = self.run_fast_stage(inputs)
        if unsure.any():
            logits[unsure] = self._strong(trim_padding({n: a[unsure] for n, a in inputs.items()}))
        return logits

    def run_fast_stage(self, inputs: Inputs) -> tuple[Logits, npt.NDArray[np.bool_]]:
        """Return the fast model's logits and which rows are below the threshold, bool (batch,).

        Safe to call while another thread runs the cascade.
        """
        logits = self._fast(inputs)
        return logits, confidence(logits) < self._threshold
