"""Raw rows (texts or images) to named arrays, kept as plain files beside each variant.

Both kinds work in two steps, so that a server can read each request in its own thread and put a
whole batch together at once: `encode` (row by row), then `collate`. Neither imports torch or
transformers.
"""

from __future__ import annotations

import math
from pathlib import Path

from mlflow_pt_deploy.artifact_files import read_json
from mlflow_pt_deploy.errors import ArtifactError
from mlflow_pt_deploy.preprocess.base import (
    Axis,
    Preprocessor,
    Row,
    row_from_json,
    row_to_json,
)
from mlflow_pt_deploy.preprocess.text import TextPreprocessor

__all__ = [
    "Axis",
    "Preprocessor",
    "Row",
    "TextPreprocessor",
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
    """Read what a preprocessor's `save` wrote, of whichever kind.

    Raises:
        ArtifactError: A file is missing or unreadable.
    """
    try:
        settings = read_json(folder / "preprocessor.json", _MAX_BYTES)
        kind = _checked(settings)
    except (ArtifactError, ValueError) as error:
        raise ArtifactError(f"{folder.name}: the preprocessor cannot be read: {error}") from error
    if kind == "text":
        return TextPreprocessor.load(folder)
    from mlflow_pt_deploy.preprocess.image import ImagePreprocessor  # and Pillow with it

    return ImagePreprocessor.load(folder)


def _checked(settings: object) -> str:
    """The kind, once each setting that decides how much memory a row takes is within bounds."""
    if not isinstance(settings, dict) or settings.get("kind") not in ("text", "image"):
        raise ValueError("its kind is neither text nor image")
    for key, (least, most) in _BOUNDS.items():
        value = settings.get(key, least)
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"{key} is not a whole number from {least} to {most}")
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
