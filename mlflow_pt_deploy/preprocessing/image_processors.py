"""Convert settings of transformers' image processors to settings of `ImagePreprocessor`.

transformers completes the settings with the defaults of the processor class, e.g. whether a single
number is a square or the shorter edge. `models.transformers_check` compares the pixels with those
of the processor when a model is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from mlflow_pt_deploy.errors import ModelError

_FILE = "preprocessor_config.json"
_TYPES = ("image_processor_type", "feature_extractor_type")
_UNSUPPORTED = ("do_pad", "do_thumbnail", "do_align_long_axis", "do_color_quantize", "size_divisor")
_STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
_BILINEAR = 2
_MIN_STRETCHED = 384  # pixels; ConvNeXt stretches images from this size instead of cropping
_LEVIT_SCALE = 256 / 224  # extra scale of the LeViT processor, not in its settings


def complete(processor: Mapping[str, Any]) -> dict[str, Any]:
    """Complete settings with the defaults of the transformers class.

    Args:
        processor: Content of preprocessor_config.json; returned unchanged if it names no class.

    Raises:
        ModelError: transformers has no such class, or the class rejects the settings.
    """
    if not any(processor.get(name) for name in _TYPES):
        return dict(processor)
    with TemporaryDirectory() as folder:
        Path(folder, _FILE).write_text(json.dumps(dict(processor)), encoding="utf8")
        try:
            own = own_processor(Path(folder))
        except Exception as error:  # depends on the processor class
            # transformers 5.17 needs torchvision here; settings with a full size are usable.
            if isinstance(error, ImportError) and isinstance(processor.get("size"), Mapping):
                return dict(processor)
            name = next(processor[key] for key in _TYPES if processor.get(key))
            raise ModelError(
                "preprocessor_config.json: unsupported image preprocessing: transformers "
                f"{version('transformers')} cannot create a {name}."
            ) from error
    steps = {name: bool(getattr(own, name, False)) for name in _STEPS}
    found = own.to_dict() | steps  # to_dict omits None
    return json.loads(json.dumps(found, default=int))  # type: ignore[no-any-return]


def own_processor(folder: Path) -> Any:
    """The transformers image processor of a model folder, with the Pillow backend."""
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(
        str(folder), backend="pil", trust_remote_code=False, local_files_only=True
    )


def settings(processor: Mapping[str, Any]) -> dict[str, Any]:
    """Convert settings to arguments of `ImagePreprocessor`.

    Args:
        processor: Result of `complete`.

    Raises:
        KeyError, TypeError, ValueError: The settings are not supported.
    """
    if unsupported := [name for name in _UNSUPPORTED if processor.get(name)]:
        raise ValueError(", ".join(unsupported))
    mean, std = np.zeros(3), np.ones(3)
    if processor.get("do_normalize", True):
        mean, std = (np.ones(3) * processor[name] for name in ("image_mean", "image_std"))
    if processor.get("rescale_offset"):  # EfficientNet: -1 to 1
        mean = mean + 1
    if processor.get("include_top"):  # EfficientNet: divided by std again
        std = std * processor["image_std"]
    rescale = processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1.0
    return {
        **_geometry(processor),
        "resample": int(processor.get("resample", _BILINEAR)),
        "rescale": rescale,
        "mean": tuple(map(float, mean)),
        "std": tuple(map(float, std)),
        "whole_pixels": True,
        "bgr": bool(processor.get("do_flip_channel_order")),
    }


def _geometry(processor: Mapping[str, Any]) -> dict[str, Any]:
    """Output size, and scaling before the center crop."""
    if not processor.get("do_resize", True):
        raise ValueError("do_resize is false")
    size = _edges(processor["size"])
    crop = _edges(processor["crop_size"]) if processor.get("do_center_crop") else None
    edge = size.get("shortest_edge") or 0
    part = processor.get("crop_pct")
    if edge and part and crop is None:  # ConvNeXt and ResNet
        crop, edge = (
            {"height": edge, "width": edge},
            0 if edge >= _MIN_STRETCHED else int(edge / part),
        )
    elif edge and part:  # PoolFormer
        edge = int(edge / part)
    elif edge and "Levit" in str([processor.get(name) for name in _TYPES]):
        edge = int(_LEVIT_SCALE * edge)
    if crop is None and edge:
        raise ValueError("shortest_edge without a crop")
    height, width = (int((crop or size)[name]) for name in ("height", "width"))
    found: dict[str, Any] = {"height": height, "width": width, "shortest_edge": int(edge)}
    if crop and not edge and "height" in size and crop != size:
        found["stretch"] = (int(size["height"]), int(size["width"]))
    return found


def _edges(size: Any) -> dict[str, Any]:
    return {"height": size, "width": size} if isinstance(size, int) else dict(size)
