"""Golden check: compare logits with those stored at export, on every machine that loads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mlflow_pt_deploy.errors import ArtifactError, DeviceMemoryError, root_cause
from mlflow_pt_deploy.preprocessing import Row, row_from_json
from mlflow_pt_deploy.runtimes.base import Logits
from mlflow_pt_deploy.system.device import CPU
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
    "fp8-dynamic": 1e-1,
    "int8-dynamic": 1e-1,
    "int8-static": 1e-1,
    "int8-accuracy": 1e-1,
    "mixed": 1e-1,
}


class GoldenComparison(NamedTuple):
    """Golden rows on this machine against those at export.

    Attributes:
        rows: The golden rows.
        changed: Number of rows with another label.
        difference: Largest difference of a logit.
        allowed: Largest difference that rounding explains.
    """

    rows: tuple[Row, ...]
    changed: int
    difference: float
    allowed: float

    @property
    def equal(self) -> bool:
        """Whether the logits differ by rounding only; False for NaN."""
        return self.difference <= self.allowed


def read_golden_rows(folder: Path) -> list[Row]:
    """Golden rows of a variant that was verified; of a portable one, those of the CPU's stage."""
    own = folder / GOLDEN
    golden = read_json(own if own.exists() else folder / CPU / GOLDEN)
    return [row_from_json(row) for row in golden["rows"]]


def _read_golden(loaded: LoadedVariant, folder: Path) -> tuple[list[Row], Logits]:
    """Return the golden rows and their stored logits, float32 (rows, classes)."""
    column = loaded.preprocessor.column
    try:
        golden = read_json(loaded.running_folder(folder) / GOLDEN)
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
    """Check that the logits of the golden rows differ from the stored ones by rounding only.

    Raises:
        ArtifactError: They differ by more, or golden.json is invalid.
    """
    compared = compare_golden_rows(loaded, folder)
    if not compared.equal:
        raise ArtifactError(
            f"{loaded.manifest.name} gives other logits on this machine than at export: the "
            f"difference is {compared.difference:.3g}, the tolerance {compared.allowed:.3g}. Run "
            "pt-deploy optimize on this machine."
        )


def compare_golden_rows(loaded: LoadedVariant, folder: Path) -> GoldenComparison:
    """Compute the golden rows and compare their logits with the stored ones.

    Raises:
        ArtifactError: golden.json is invalid, or the variant fails on its rows.
        DeviceMemoryError: The device has no memory for a row.
    """
    rows, expected = _read_golden(loaded, folder)
    try:
        actual = np.concatenate([loaded.logits([row]) for row in rows])
    except DeviceMemoryError:
        raise
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
    allowed = _TOLERANCE[loaded.running.precision] * float(np.abs(expected).max())
    if not np.isfinite(expected).all():
        difference = float("nan")
    changed = int(np.sum(actual.argmax(axis=1) != expected.argmax(axis=1)))
    return GoldenComparison(tuple(rows), changed, difference, allowed)
