"""The golden rows: answers of the very artifact, kept to check it wherever it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mlflow_pt_deploy.artifact_files import read_json
from mlflow_pt_deploy.errors import ArtifactError, first_line
from mlflow_pt_deploy.preprocess import Row, row_from_json
from mlflow_pt_deploy.variants.base import Logits

if TYPE_CHECKING:
    from mlflow_pt_deploy.variants.folder import LoadedVariant

GOLDEN = "golden.json"
# Largest |difference| to the golden logits, as a share of their largest magnitude. Integer kernels
# round differently from one instruction set to the next; fp32 ones hardly do.
_TOLERANCE = {
    "fp32": 1e-3,
    "bf16": 5e-2,
    "fp16": 1e-2,
    "int8-dynamic": 1e-1,
    "int8-static": 1e-1,
    "int8-accuracy": 1e-1,
    "mixed": 1e-1,
}


def _read_golden(loaded: LoadedVariant, folder: Path) -> tuple[list[Row], Logits]:
    """The golden rows and their logits, float32 (rows, classes)."""
    column = loaded.preprocessor.column
    try:
        golden = read_json(folder / GOLDEN)
        rows = [row_from_json(row) for row in golden["rows"]]
        expected = np.asarray(golden["logits"], dtype=np.float32)
        kind = str if column == "text" else bytes
        if not rows or not all(isinstance(row, kind) for row in rows):
            raise ValueError(f"its rows are not {column}s")
        if expected.ndim != 2 or len(expected) != len(rows):
            raise ValueError("it has not one list of logits for each row")
        if expected.shape[1] != len(loaded.labels):
            raise ValueError(
                f"it has {expected.shape[1]} logits a row, and labels.json names "
                f"{len(loaded.labels)} classes"
            )
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise ArtifactError(
            f"{loaded.manifest.name}: {GOLDEN} cannot be used: {str(error)[:200]}. Export the "
            "variant again."
        ) from error
    return rows, expected


def check_golden_rows(loaded: LoadedVariant, folder: Path) -> None:
    """Compare a variant's answers to its golden rows with those that were kept.

    Raises:
        ArtifactError: They differ by more than rounding, or golden.json cannot be used.
    """
    rows, expected = _read_golden(loaded, folder)
    try:
        actual = np.concatenate([loaded.logits([row]) for row in rows])
    except Exception as error:  # the runtime's own, where weights and tokenizer do not fit
        raise ArtifactError(
            f"{loaded.manifest.name} cannot answer its golden rows ({type(error).__name__}: "
            f"{first_line(error)[:300]}). Export the variant again."
        ) from error
    if actual.shape != expected.shape:
        raise ArtifactError(
            f"{loaded.manifest.name} answers with {actual.shape[-1]} logits a row, and labels.json "
            f"names {len(loaded.labels)} classes. Export the variant again."
        )
    worst = float(np.abs(actual - expected).max())
    allowed = _TOLERANCE[loaded.manifest.precision] * float(np.abs(expected).max())
    if not (worst <= allowed and np.isfinite(expected).all()):  # also catches NaN
        raise ArtifactError(
            f"{loaded.manifest.name} answers differently here than where it was exported: its "
            f"logits are off by {worst:.3g}, allowed {allowed:.3g}. Run pt-deploy optimize on "
            "this machine."
        )
