"""Settings of transformers' image processors, in every form that the hub has, as ours.

transformers itself fills in what a file leaves to its class: defaults, and whether one number is a
square or the shorter edge. What is understood from there is compared with the processor's own
pixels when a model is brought (`models.reading`).
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
_STRANGE = ("do_pad", "do_thumbnail", "do_align_long_axis", "do_color_quantize", "size_divisor")
_STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
_BILINEAR = 2
_WARPED = 384  # ConvNeXt stretches pictures to this size and above, instead of cutting them
_LEVIT = 256 / 224  # its class scales by so much more than its settings say


def complete(processor: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with everything that transformers' class for them adds or converts.

    Args:
        processor: The content of a preprocessor_config.json. Without the name of a class it is
            taken as it is.

    Raises:
        ModelError: transformers has no such class, or it refuses the settings.
    """
    if not any(processor.get(name) for name in _TYPES):
        return dict(processor)
    with TemporaryDirectory() as folder:
        Path(folder, _FILE).write_text(json.dumps(dict(processor)), encoding="utf8")
        try:
            own = own_processor(Path(folder))
        except Exception as error:  # transformers' own
            # Older ones (5.17) make none without torchvision; a whole size is plain enough.
            if isinstance(error, ImportError) and isinstance(processor.get("size"), Mapping):
                return dict(processor)
            name = next(processor[it] for it in _TYPES if processor.get(it))
            raise ModelError(
                "preprocessor_config.json: the images are prepared in a way that is not known "
                f"here: transformers {version('transformers')} cannot make a {name}."
            ) from error
    steps = {name: bool(getattr(own, name, False)) for name in _STEPS}
    found = own.to_dict() | steps  # it leaves out what is None
    return json.loads(json.dumps(found, default=int))  # type: ignore[no-any-return]


def own_processor(folder: Path) -> Any:
    """transformers' image processor of a model folder, on Pillow."""
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(
        str(folder), backend="pil", trust_remote_code=False, local_files_only=True
    )


def settings(processor: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `ImagePreprocessor`.

    Args:
        processor: What `complete` returns.

    Raises:
        KeyError, TypeError, ValueError: It has a form that is not known here.
    """
    if strange := [name for name in _STRANGE if processor.get(name)]:
        raise ValueError(", ".join(strange))
    mean, std = np.zeros(3), np.ones(3)
    if processor.get("do_normalize", True):
        mean, std = (np.ones(3) * processor[name] for name in ("image_mean", "image_std"))
    if processor.get("rescale_offset"):  # EfficientNet's: -1 to 1
        mean = mean + 1
    if processor.get("include_top"):  # EfficientNet's: divided once more
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
    """Size of the result, and how a picture is scaled before its middle is cut out."""
    if not processor.get("do_resize", True):
        raise ValueError("do_resize is false")
    size = _edges(processor["size"])
    crop = _edges(processor["crop_size"]) if processor.get("do_center_crop") else None
    edge = size.get("shortest_edge") or 0
    part = processor.get("crop_pct")
    if edge and part and crop is None:  # ConvNeXt's and ResNet's
        crop, edge = {"height": edge, "width": edge}, 0 if edge >= _WARPED else int(edge / part)
    elif edge and part:  # PoolFormer's
        edge = int(edge / part)
    elif edge and "Levit" in str([processor.get(name) for name in _TYPES]):
        edge = int(_LEVIT * edge)
    if crop is None and edge:
        raise ValueError("shortest_edge without a crop")
    height, width = (int((crop or size)[name]) for name in ("height", "width"))
    found: dict[str, Any] = {"height": height, "width": width, "shortest_edge": int(edge)}
    if crop and not edge and "height" in size and crop != size:
        found["stretch"] = (int(size["height"]), int(size["width"]))
    return found


def _edges(size: Any) -> dict[str, Any]:
    return {"height": size, "width": size} if isinstance(size, int) else dict(size)
