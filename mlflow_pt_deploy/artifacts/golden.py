"""Golden check: compare logits with those stored at export, on every machine that loads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mlflow_pt_deploy.errors import ArtifactError, root_cause
from mlflow_pt_deploy.preprocessing import Row, row_from_json
from mlflow_pt_deploy.runtimes.base import Logits
from mlflow_pt_deploy.system.regular_files import read_json

if TYPE_CHECKING:
    from mlflow_pt_deploy.artifacts.loading import LoadedVariant

GOLDEN = "golden.json"
# Maximum |difference| to the golden logits, relative to their largest magnitude. Integer kernels
# round differently between instruction sets; fp32 kernels hardly do.
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
    """Return the golden rows and their stored logits, float32 (rows, classes)."""
    column = loaded.preprocessor.column
    try:
        golden = read_json(folder / GOLDEN)
        rows = [row_from_json(row) for row in golden["rows"]]
        expected = np.asarray(golden["logits"], dtype=np.float32)
        kind = str if column == "text" else bytes
        if not rows or not all(isinstance(row, kind) for row in rows):
            raise ValueError(f"rows are not {column}s")
        if expected.ndim != 2 or len(expected) != len(rows):
            raise ValueError("there must be one list of logits per row")
        if expected.shape[1] != len(loaded.labels):
            raise ValueError(
                f"it has {expected.shape[1]} logits per row, but labels.json has "
                f"{len(loaded.labels)} classes"
            )
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise ArtifactError(
            f"{loaded.manifest.name}: {GOLDEN} is invalid: {str(error)[:200]}. Export the "
            "variant again."
        ) from error
    return rows, expected


def check_golden_rows(loaded: LoadedVariant, folder: Path) -> None:
    """Compare the logits of the golden rows with the stored ones.

    Raises:
        ArtifactError: They differ by more than rounding, or golden.json is invalid.
    """
    rows, expected = _read_golden(loaded, folder)
    try:
        actual = np.concatenate([loaded.logits([row]) for row in rows])
    except Exception as error:  # any error of the runtime, e.g. tokenizer does not fit
        raise ArtifactError(
            f"{loaded.manifest.name} fails on its golden rows ({type(error).__name__}: "
            f"{root_cause(error)[:300]}). Export the variant again."
        ) from error
    if actual.shape != expected.shape:
        raise ArtifactError(
            f"{loaded.manifest.name} returns {actual.shape[-1]} logits per row, but labels.json "
            f"has {len(loaded.labels)} classes. Export the variant again."
        )
    difference = float(np.abs(actual - expected).max())
    allowed = _TOLERANCE[loaded.manifest.precision] * float(np.abs(expected).max())
    if not (difference <= allowed and np.isfinite(expected).all()):  # also true for NaN
        raise ArtifactError(
            f"{loaded.manifest.name} gives other logits on this machine than at export: the "
            f"difference is {difference:.3g}, the tolerance {allowed:.3g}. Run pt-deploy optimize "
            "on this machine."
        )
