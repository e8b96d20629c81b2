"""A fast model that answers where it is sure, and a stronger one for the rest.

Both are variants of their own, kept whole in the folders ``fast`` and ``strong``. Confidence is the
largest softmax probability (Hendrycks & Gimpel 2017; as a cascade: Wang et al. 2022).
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
)

if TYPE_CHECKING:
    from mlflow_pt_deploy.models import Classifier

CASCADE = "cascade"
"""First part of a cascade's name, where other variants have their model's."""

FAST, STRONG = "fast", "strong"
"""Folders of the two stages."""


@dataclass(frozen=True)
class Cascade(Variant):
    """Two variants and the confidence below which the second one answers.

    Attributes:
        threshold: Rows of which the fast model is less sure go to the strong one, 0 to 1.
        fast, strong: Names of the two variants.
        flags: Instruction sets that either needs.
        trusted: True where either carries code.
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
        raise VariantError("a cascade is made of two exported variants; use write_cascade.")

    def load(self, folder: Path, *, device: str, threads: int) -> Predict:
        raise VariantError("a cascade is loaded stage by stage; use load_variant.")

    def combine(self, predictors: Sequence[Predict]) -> Predict:
        fast, strong = predictors
        return CascadePredictor(fast, strong, self.threshold)


class CascadePredictor:
    """A loaded cascade.

    Args:
        fast, strong: What the two variants predict.
        threshold: See `Cascade`.

    Attributes:
        pads: Whether one of them does.
    """

    def __init__(self, fast: Predict, strong: Predict, threshold: float) -> None:
        self._fast, self._strong, self._threshold = fast, strong, threshold
        self.pads = pads_rows(fast) or pads_rows(strong)

    @property
    def models(self) -> tuple[Predict, Predict]:
        """The fast one and the strong one."""
        return self._fast, self._strong

    def __call__(self, inputs: Inputs) -> Logits:
        logits, unsure = self.run_fast_stage(inputs)
        if unsure.any():
            logits[unsure] = self._strong(_shortened({n: a[unsure] for n, a in inputs.items()}))
        return logits

    def run_fast_stage(self, inputs: Inputs) -> tuple[Logits, npt.NDArray[np.bool_]]:
        """What the fast model says, and of which rows it is not sure enough.

        May be called while another thread computes.
        """
        logits = self._fast(inputs)
        return logits, confidence(logits) < self._threshold


def _shortened(inputs: Inputs) -> Inputs:
    """The same without the padding that all rows share; images have none."""
    if "attention_mask" not in inputs:
        return inputs
    longest = int(inputs["attention_mask"].sum(1).max())
    return {name: array[:, :longest] for name, array in inputs.items()}
