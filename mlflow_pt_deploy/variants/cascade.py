"""A fast model that answers where it is sure, and a stronger one for the rest.

Both are variants of their own, kept whole in the folders ``fast`` and ``strong``. Confidence is the
largest softmax probability (Hendrycks & Gimpel 2017; as a cascade: Wang et al. 2022).
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt

from mlflow_pt_deploy.errors import VariantError
from mlflow_pt_deploy.preprocess import Row, load_preprocessor
from mlflow_pt_deploy.variants.base import (
    Inputs,
    Logits,
    Predict,
    Variant,
    confidence,
    pads_rows,
)

if TYPE_CHECKING:
    from mlflow_pt_deploy.models import Classifier
    from mlflow_pt_deploy.variants.manifest import Manifest

CASCADE = "cascade"
"""First part of a cascade's name, where other variants have their model's."""

FAST, STRONG = "fast", "strong"
# Golden rows keep away from the threshold: integer kernels of another processor must not send a
# row to the other model.
_CLEAR = 0.05


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
        from mlflow_pt_deploy.variants.folder import load_variant

        fast, strong = (
            load_variant(
                folder / stage,
                device=device,
                threads=threads,
                allow_code=self.trusted,
                check_golden=False,
                verified=True,
            ).predict
            for stage in (FAST, STRONG)
        )

        return Stages(fast, strong, self.threshold)


class Stages:
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
        logits, unsure = self.glance(inputs)
        if unsure.any():
            logits[unsure] = self._strong(_shortened({n: a[unsure] for n, a in inputs.items()}))
        return logits

    def glance(self, inputs: Inputs) -> tuple[Logits, npt.NDArray[np.bool_]]:
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


def write_cascade(
    target: Path,
    fast: Path,
    strong: Path,
    *,
    threshold: float,
    golden_rows: Sequence[Row],
) -> Manifest:
    """Put two variants together into `target`, which appears complete or not at all.

    Args:
        target: The folder to create; an older one of that name is replaced.
        fast: Folder of the variant that is asked first.
        strong: Folder of the one that answers where the first is not sure.
        threshold: See `Cascade`.
        golden_rows: Raw rows to keep answers of, as far as they are clear cases.

    Raises:
        VariantError: The two name their classes or read their rows differently, or they
            answer with NaN.
        OSError: The disk is full or not writable; nothing is left behind.
    """
    from mlflow_pt_deploy.variants.folder import load_variant, staged, verify, write_golden

    first, second = verify(fast), verify(strong)
    shared = ("labels.json", *load_preprocessor(fast).files)
    for part in shared:
        if first.files[part] != second.files.get(part):
            raise VariantError(
                f"{first.name} and {second.name} cannot form a cascade: their {part} differ. "
                "Distill both from the same teacher."
            )
    cascade = Cascade(
        threshold=threshold,
        fast=first.name,
        strong=second.name,
        flags=tuple(sorted({*first.cpu_flags, *second.cpu_flags})),
        trusted=first.carries_code or second.carries_code,
    )
    with staged(target, cascade, CASCADE) as folder:
        shutil.copytree(fast, folder / FAST)
        shutil.copytree(strong, folder / STRONG)
        for part in shared:
            shutil.copyfile(fast / part, folder / part)
        surest = load_variant(fast, threads=1, allow_code=True, check_golden=False)
        sure = confidence(np.concatenate([surest.logits([row]) for row in golden_rows]))
        clear = [
            row
            for row, value in zip(golden_rows, sure.tolist(), strict=True)
            if abs(value - threshold) > _CLEAR
        ]
        predict = cascade.load(folder, device="cpu", threads=1)
        write_golden(folder, predict, surest.preprocessor, clear or list(golden_rows[:1]))
    return verify(target)
