"""Image classifiers: transformers models, and untrained ResNet and MobileNetV2 networks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)
from transformers.image_processing_base import ImageProcessingMixin

from mlflow_pt_deploy.errors import ModelError
from mlflow_pt_deploy.models.base import Classifier
from mlflow_pt_deploy.preprocessing.image import ImagePreprocessor, Pixels
from mlflow_pt_deploy.preprocessing.image_processors import complete

_FILE = "preprocessor_config.json"
_MIN_EDGE, _SMALL_EDGE = 32, 48  # pixels
_MOMENTUM = 0.1  # PyTorch's default
_MAX_SHIFT = 8  # 1/8 of an edge
_MIN_AREA, _MAX_STRETCH = 0.5, 0.15


class ImageClassifier(Classifier):
    """An image classifier with its image processor.

    Args:
        network: A transformers ``...ForImageClassification`` with three input channels.
        processor: Content of preprocessor_config.json.

    Raises:
        ModelError: The image preprocessing is not supported.
    """

    auto: ClassVar[Any] = AutoModelForImageClassification
    preprocessor: ImagePreprocessor

    def __init__(self, network: Any, processor: Mapping[str, Any]) -> None:
        # The fastest memory layout for convolutions on CPUs, in training and eager inference.
        network.to(memory_format=torch.channels_last)
        self.processor = complete(processor)
        super().__init__(network, ImagePreprocessor.from_transformers(self.processor))
        if getattr(network.config, "num_channels", 3) != 3:
            raise ModelError(
                f"{network.config.model_type} has {network.config.num_channels} input channels; "
                "choose a model with three."
            )
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                # transformers' MobileNets use 0.997 from TensorFlow, whose definition is 1 - x.
                # Without this, evaluation would depend on the last batch only.
                module.momentum = _MOMENTUM

    @classmethod
    def with_processor(cls, network: Any, folder: str) -> ImageClassifier:
        processor, _ = ImageProcessingMixin.get_image_processor_dict(folder)
        return cls(network, processor)

    def save_processor(self, folder: Path) -> None:
        text = json.dumps(self.processor, indent=2)
        (folder / _FILE).write_text(text, encoding="utf8")

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixels, float32 (batch, 3, height, width), to logits (batch, classes)."""
        return self.logits(pixel_values=pixel_values.to(self.network.dtype))

    def augment(self, encoded: Sequence[Pixels], random: np.random.Generator) -> list[Pixels]:
        """Augment images for one epoch.

        Color images are cropped to at least half of their area and mirrored at random (Szegedy et
        al. 2015). Grey images may be letters, digits or scans, which must not be mirrored; they
        are shifted by up to 1/8 of their size.
        """
        return [
            _shift(image, random) if _is_grey(image) else _crop(image, random) for image in encoded
        ]


def _is_grey(image: Pixels) -> bool:
    return bool((image == image[..., :1]).all())


def _shift(image: Pixels, random: np.random.Generator) -> Pixels:
    """Shift by at most 1/8 of the size; edge pixels are repeated."""
    height, width, _ = image.shape
    limit = np.array([max(1, height // _MAX_SHIFT), max(1, width // _MAX_SHIFT)])
    down, right = random.integers(-limit, limit + 1)
    rows = np.clip(np.arange(height) + down, 0, height - 1)
    columns = np.clip(np.arange(width) + right, 0, width - 1)
    shifted: npt.NDArray[np.uint8] = image[rows[:, None], columns]
    return shifted


def _crop(image: Pixels, random: np.random.Generator) -> Pixels:
    """Crop at random, resize to the original size, and mirror with probability 0.5."""
    height, width, _ = image.shape
    edge = np.sqrt(random.uniform(_MIN_AREA, 1))
    ratio = np.exp(random.uniform(-_MAX_STRETCH, _MAX_STRETCH))
    part = np.minimum((width * edge * ratio, height * edge / ratio), (width, height))
    left, top = random.uniform(0, (width, height) - part)
    picture = Image.fromarray(image).resize(
        (width, height), Image.Resampling.BILINEAR, box=(left, top, left + part[0], top + part[1])
    )
    if random.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(picture)


def new_resnet(labels: Sequence[str], size: int) -> ImageClassifier:
    """Create a ResNet-18 (He et al. 2015) with random weights, half as wide for small images.

    Args:
        labels: Names of the classes.
        size: Height and width of the input in pixels.

    Raises:
        ModelError: The size is below 32 pixels, the minimum for five downsampling steps.
    """
    if size < _MIN_EDGE:
        raise ModelError(f"image_size is {size}; give {_MIN_EDGE} pixels or more.")
    width = 64 if size > _SMALL_EDGE else 32
    config = ResNetConfig(
        embedding_size=width,
        hidden_sizes=[width, 2 * width, 4 * width, 8 * width],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        **_named(labels),
    )
    return _from_scratch(ResNetForImageClassification(config), _processor(size))


def new_mobilenet(teacher: ImageClassifier, *, width: float = 1.0) -> ImageClassifier:
    """Create a MobileNetV2 (Sandler et al. 2018) with random weights and the teacher's inputs.

    Args:
        teacher: The fine-tuned teacher; not changed.
        width: Multiplier of the number of channels.

    Raises:
        ModelError: The width is not above 0 and at most 2.
    """
    if not 0 < width <= 2:
        raise ModelError(f"student_width is {width:g}; give a number above 0, up to 2.")
    edge = teacher.preprocessor.settings.height
    config = MobileNetV2Config(
        image_size=edge,
        depth_multiplier=width,
        # A smaller stride keeps more than one position for small images.
        output_stride=8 if edge <= _SMALL_EDGE else 32,
        tf_padding=False,
        classifier_dropout_prob=0.1,
        **_named(teacher.labels),
    )
    return _from_scratch(MobileNetV2ForImageClassification(config), teacher.processor)


def _from_scratch(network: Any, processor: Mapping[str, Any]) -> ImageClassifier:
    """Initialize convolutions with Kaiming normal weights (He et al. 2015).

    transformers' default weights are about 50 times smaller. With them, the running statistics of
    batch norm need hundreds of steps, and all predictions are the same until then.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    classifier = ImageClassifier(network, processor)
    classifier.pretrained = False
    return classifier.eval()


def _named(labels: Sequence[str]) -> dict[str, Any]:
    names = dict(enumerate(labels))
    return {"id2label": names, "label2id": {name: index for index, name in names.items()}}


def _processor(size: int) -> dict[str, Any]:
    """Settings that stretch images to size x size and scale values to -1 to 1."""
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
