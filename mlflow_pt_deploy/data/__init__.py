"""Data sets: `load_data` reads any ``--data`` value into `Splits`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from mlflow_pt_deploy.data.abo import read_abo
from mlflow_pt_deploy.data.digits import read_digits
from mlflow_pt_deploy.data.files import read_files
from mlflow_pt_deploy.data.hub import read_hub
from mlflow_pt_deploy.data.splits import Split, Splits, limit_splits
from mlflow_pt_deploy.data.synthetic import read_catalog
from mlflow_pt_deploy.errors import DataError

__all__ = ["Split", "Splits", "load_data"]

_SUPPORTED = (
    "a folder with train, validation and test as .csv, .csv.gz or .parquet; one such file; "
    "hf:OWNER/NAME or hf:OWNER/NAME:CONFIG; catalog; digits; abo:FOLDER"
)


def load_data(
    spec: str, *, seed: int = 0, limit: int = 0, on_note: Callable[[str], object] | None = None
) -> Splits:
    """Read and check a data set, and cut the splits that are missing.

    Args:
        spec: A folder or file, ``hf:OWNER/NAME[:CONFIG]``, ``catalog``, ``digits`` or
            ``abo:FOLDER``.
            Write ``./catalog`` for a folder with one of these names.
        seed: Random seed for cutting splits and for generating ``catalog``.
        limit: Maximum number of rows per split, for quick trials; 0 reads all rows.
        on_note: Called with each of `Splits.notes`, e.g. `print`.

    Raises:
        DataError: The spec is unknown, or its rows cannot be used.
        MissingExtraError: The spec is ``hf:...`` and `datasets` is not installed.
    """
    if limit < 0:
        raise DataError(f"limit is {limit}. Give a number of rows, or 0 for all of them.")
    splits = _load(spec, seed)
    splits = limit_splits(splits, limit, seed) if limit else splits
    if on_note is not None:
        for note in splits.notes:
            on_note(f"data: {note}")
    return splits


def _load(spec: str, seed: int) -> Splits:
    kind, _, rest = spec.partition(":")
    if spec == "catalog":
        return read_catalog(seed=seed)
    if spec == "digits":
        return read_digits(seed=seed)
    if kind == "hf":
        return read_hub(rest, source=spec, seed=seed)
    if kind == "abo":
        return read_abo(Path(os.path.expanduser(rest)), source=spec, seed=seed)
    path = Path(os.path.expanduser(spec))  # Path.expanduser raises for an unknown user
    if not spec.strip() or not os.path.exists(path):
        raise DataError(
            f"--data {spec!r} is neither a known source nor a path that exists. Give {_SUPPORTED}."
        )
    return read_files(path, source=spec, seed=seed)
