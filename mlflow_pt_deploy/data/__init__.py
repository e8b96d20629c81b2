"""Where rows come from: every ``--data`` ends up as `Splits`.

Knows which source a spec names; the sources know how to read, `splits` how to check and cut.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from mlflow_pt_deploy.data.abo import read_abo
from mlflow_pt_deploy.data.catalog import read_catalog
from mlflow_pt_deploy.data.digits import read_digits
from mlflow_pt_deploy.data.files import read_files
from mlflow_pt_deploy.data.hub import read_hub
from mlflow_pt_deploy.data.splits import Split, Splits, limit_splits
from mlflow_pt_deploy.errors import DataError

__all__ = ["Split", "Splits", "load_data"]

_ALLOWED = (
    "a folder with train, validation and test as .csv, .csv.gz or .parquet; one such file; "
    "hf:OWNER/NAME or hf:OWNER/NAME:CONFIG; catalog; digits; abo:FOLDER"
)


def load_data(
    spec: str, *, seed: int = 0, limit: int = 0, say: Callable[[str], object] | None = None
) -> Splits:
    """Read, check and, where a split is missing, cut a data set.

    Args:
        spec: A folder or file, ``hf:OWNER/NAME[:CONFIG]``, ``catalog``, ``digits`` or
            ``abo:FOLDER``.
            A folder that bears one of these names is given as ``./catalog``.
        seed: Decides which rows a cut takes, and what ``catalog`` generates.
        limit: At most this many rows a split, for quick trials; 0 is all of them.
        say: Called with each of `Splits.notes`, e.g. `print`.

    Raises:
        DataError: The spec names nothing, or its rows cannot be used.
        MissingExtraError: ``hf:`` without the `datasets` library.
    """
    if limit < 0:
        raise DataError(f"limit is {limit}. Give a number of rows, or 0 for all of them.")
    splits = _load(spec, seed)
    splits = limit_splits(splits, limit, seed) if limit else splits
    if say is not None:
        for note in splits.notes:
            say(f"data: {note}")
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
    path = Path(os.path.expanduser(spec))  # pathlib's own raises where there is no such user
    if not spec.strip() or not os.path.exists(path):
        raise DataError(
            f"--data {spec!r} is neither a known source nor a path that exists. Give {_ALLOWED}."
        )
    return read_files(path, source=spec, seed=seed)
