"""Handwritten digits from scikit-learn: 1,797 grey images of 8 x 8 pixels.

The test part of "Optical Recognition of Handwritten Digits" (Alpaydin & Kaynak, UCI, 1998; CC BY
4.0), written by 43 people, with 17 shades of grey.
"""

from __future__ import annotations

from io import BytesIO
from typing import Any

from mlflow_pt_deploy.data.splits import Splits, build_splits

_SHADES = 16


def read_digits(*, seed: int = 0) -> Splits:
    """Load the digits as PNG images and cut them into splits.

    Args:
        seed: Random seed for cutting validation and test.
    """
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    found = load_digits()
    rows = [_png(image) for image in found.images]
    train = (rows, [str(digit) for digit in found.target])
    return build_splits({"train": train}, name="digits", source="digits", column="image", seed=seed)


def _png(shades: Any) -> bytes:
    """Encode values from 0 to `_SHADES`, float64 (height, width), as an 8-bit grey PNG."""
    from PIL import Image

    file = BytesIO()
    Image.fromarray((shades * 255 / _SHADES).round().astype("uint8")).save(file, "PNG")
    return file.getvalue()
