"""Raw rows (texts or images) to named arrays, kept as plain files beside each variant.

Both kinds work in two steps, so that a server can read each request in its own thread and put a
whole batch together at once: `encode` (row by row), then `collate`. Neither imports torch or
transformers.
"""

from __future__ import annotations

import json
from pathlib import Path

from mlflow_pt_deploy.errors import ArtifactError
from mlflow_pt_deploy.preprocessing.base import (
    Axis,
    Preprocessor,
    Row,
    row_from_json,
    row_to_json,
)
from mlflow_pt_deploy.preprocessing.text import TextPreprocessor

__all__ = [
    "Axis",
    "Preprocessor",
    "Row",
    "TextPreprocessor",
    "load_preprocessor",
    "row_from_json",
    "row_to_json",
]


def load_preprocessor(folder: Path) -> Preprocessor:
    """Read what a preprocessor's `save` wrote, of whichever kind.

    Raises:
        ArtifactError: A file is missing or unreadable.
    """
    try:
        settings = json.loads((folder / "preprocessor.json").read_text(encoding="utf8"))
        kind = settings["kind"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{folder.name}: the preprocessor cannot be read: {error}") from error
    if kind == "text":
        return TextPreprocessor.load(folder)
    from mlflow_pt_deploy.preprocessing.image import ImagePreprocessor  # and Pillow with it

    return ImagePreprocessor.load(folder)
