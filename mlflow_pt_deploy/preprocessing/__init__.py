"""Preprocessing of texts and images to named arrays; settings are files in each variant folder.

Preprocessing has two steps: `encode` works row by row, `collate` builds a batch. A server encodes
rows as requests arrive and collates a batch at once. Neither torch nor transformers is imported.
"""

from __future__ import annotations

import math
from pathlib import Path

from mlflow_pt_deploy.errors import ArtifactError, MissingExtraError
from mlflow_pt_deploy.preprocessing.base import (
    Axis,
    Preprocessor,
    Row,
    row_from_json,
    row_to_json,
)
from mlflow_pt_deploy.preprocessing.text import TextPreprocessor
from mlflow_pt_deploy.system.regular_files import read_json

__all__ = [
    "Axis",
    "Preprocessor",
    "Row",
    "TextPreprocessor",
    "input_column",
    "load_preprocessor",
    "row_from_json",
    "row_to_json",
]

_MAX_BYTES = 2**20
_BOUNDS = {
    "max_length": (1, 2**20),
    "pad_id": (0, 2**31),
    "height": (1, 8192),
    "width": (1, 8192),
    "shortest_edge": (0, 16384),
    "resample": (0, 5),
}


def load_preprocessor(folder: Path) -> Preprocessor:
    """Load a text or image preprocessor from the files of `save`.

    Raises:
        ArtifactError: A file is missing or unreadable.
    """
    if input_column(folder) == "text":
        return TextPreprocessor.load(folder)
    try:
        from mlflow_pt_deploy.preprocessing.image import ImagePreprocessor
    except ModuleNotFoundError as error:
        raise MissingExtraError("pillow", "images") from error
    return ImagePreprocessor.load(folder)


def input_column(folder: Path) -> str:
    """What a preprocessor reads, ``text`` or ``image``, without loading it.

    Args:
        folder: Folder of its files.

    Raises:
        ArtifactError: Its settings are missing or invalid.
    """
    try:
        return _check_settings(read_json(folder / "preprocessor.json", _MAX_BYTES))
    except (ArtifactError, ValueError) as error:
        raise ArtifactError(f"{folder.name}: the preprocessor cannot be read: {error}") from error


def _check_settings(settings: object) -> str:
    """Check the settings that determine memory use per row; return the kind."""
    if not isinstance(settings, dict) or settings.get("kind") not in ("text", "image"):
        raise ValueError("kind is neither text nor image")
    for key, (minimum, maximum) in _BOUNDS.items():
        value = settings.get(key, minimum)
        if type(value) is not int or not minimum <= value <= maximum:
            raise ValueError(f"{key} is not a whole number from {minimum} to {maximum}")
    for key in ("mean", "std"):
        value = settings.get(key, [1.0] * 3)
        if not isinstance(value, list) or len(value) != 3 or not all(map(_is_number, value)):
            raise ValueError(f"{key} is not a list of three numbers")
    if not _is_number(settings.get("rescale", 1.0)):
        raise ValueError("rescale is not a number")
    return str(settings["kind"])


def _is_number(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)  # type: ignore[arg-type]
