"""A cell of a table becomes a row that a preprocessor takes."""

from __future__ import annotations

from pathlib import Path

from mlflow_pt_deploy.data.files import image_file
from mlflow_pt_deploy.data.label_kinds import is_missing
from mlflow_pt_deploy.data.validation import Row
from mlflow_pt_deploy.errors import DataError


def read_cell(value: object, kind: str, folder: Path) -> Row:
    """Read a text, or the bytes of an image.

    Args:
        value: A text; or bytes, a path, or Hugging Face's struct of both.
        kind: ``text`` or ``image``.
        folder: Base folder of relative paths.

    Raises:
        DataError: It is missing, blank or something else; the message says what only.
    """
    if kind == "text" and isinstance(value, str) and value.strip():
        return value
    if kind == "image":
        value = _read_image(value, folder)
    if is_missing(value) or (isinstance(value, Row) and not value.strip()):
        raise DataError("is missing or blank")
    if kind == "image" and isinstance(value, bytes):
        return value
    expected = {"text": "a string", "image": "the bytes or the path of an image file"}
    raise DataError(f"is not {expected[kind]}")


def _read_image(value: object, folder: Path) -> object:
    content = image_file(value, folder)
    if not isinstance(content, Path):
        return content
    try:
        if content.is_file():
            return content.read_bytes()
    except OSError as error:  # also an invalid file name
        raise DataError(f"cannot be read ({error.strerror})") from error
    raise DataError(f"does not name a file in the folder {folder.resolve().name}")
