"""Combine two variants into a cascade."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mlflow_pt_deploy.artifacts.loading import load_variant, verify
from mlflow_pt_deploy.artifacts.manifest import Manifest
from mlflow_pt_deploy.artifacts.writing import check_same_inputs, staged, write_golden
from mlflow_pt_deploy.preprocessing import Row
from mlflow_pt_deploy.runtimes.base import confidence
from mlflow_pt_deploy.runtimes.cascade import CASCADE, FAST, STRONG, Cascade

# Golden rows keep this distance from the threshold, so that the integer kernels of another
# processor do not route a row to the other model.
_GOLDEN_MARGIN = 0.05


def write_cascade(
    target: Path,
    fast: Path,
    strong: Path,
    *,
    threshold: float,
    golden_rows: Sequence[Row],
) -> Manifest:
    """Combine two variants into `target`. The folder is created atomically.

    Args:
        target: Folder to create; an existing one is replaced.
        fast: Folder of the variant that predicts first.
        strong: Folder of the variant for rows on which the fast one is not confident.
        threshold: Confidence below which the strong variant predicts, see `Cascade`.
        golden_rows: Raw rows for the golden check; rows close to the threshold are dropped.

    Raises:
        VariantError: Class names or preprocessing of the two differ, or logits are NaN.
        OSError: The disk is full or not writable; partial output is removed.
    """
    first, second = verify(fast), verify(strong)
    shared = check_same_inputs(
        fast, strong, "form a cascade", "Distill both from the same teacher."
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
        fast_stage, strong_stage = (
            load_variant(stage, threads=1, allow_code=True, check_golden=False, verified=True)
            for stage in (fast, strong)
        )
        scores = confidence(np.concatenate([fast_stage.logits([row]) for row in golden_rows]))
        rows = [
            row
            for row, score in zip(golden_rows, scores.tolist(), strict=True)
            if abs(score - threshold) > _GOLDEN_MARGIN
        ]
        predict = cascade.combine([fast_stage.predict, strong_stage.predict])
        write_golden(folder, predict, fast_stage.preprocessor, rows or list(golden_rows[:1]))
    return verify(target)
