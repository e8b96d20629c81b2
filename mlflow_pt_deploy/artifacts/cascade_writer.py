"""Joins two variants to a cascade."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mlflow_pt_deploy.artifacts.loading import load_variant, verify
from mlflow_pt_deploy.artifacts.manifest import Manifest
from mlflow_pt_deploy.artifacts.writing import staged, write_golden
from mlflow_pt_deploy.errors import VariantError
from mlflow_pt_deploy.preprocessing import Row, load_preprocessor
from mlflow_pt_deploy.runtimes.base import confidence
from mlflow_pt_deploy.runtimes.cascade import CASCADE, FAST, STRONG, Cascade

# Golden rows keep away from the threshold: integer kernels of another processor must not send a
# row to the other model.
_CLEAR = 0.05


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
        surest, strongest = (
            load_variant(stage, threads=1, allow_code=True, check_golden=False, verified=True)
            for stage in (fast, strong)
        )
        sure = confidence(np.concatenate([surest.logits([row]) for row in golden_rows]))
        clear = [
            row
            for row, value in zip(golden_rows, sure.tolist(), strict=True)
            if abs(value - threshold) > _CLEAR
        ]
        predict = cascade.combine([surest.predict, strongest.predict])
        write_golden(folder, predict, surest.preprocessor, clear or list(golden_rows[:1]))
    return verify(target)
