"""Image classifiers of the transformers library: a teacher and a student made from scratch.

Knows Hugging Face's image processors by their settings alone; pixels are `preprocess.image`'s.
"""

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
from mlflow_pt_deploy.preprocess.image import ImagePreprocessor, Pixels
from mlflow_pt_deploy.preprocess.processors import complete

_FILE = "preprocessor_config.json"
_SMALLEST, _SMALL = 32, 48  # edges in pixels
_MOMENTUM = 0.1  # PyTorch's default
_SHIFT = 8
_LEAST_AREA, _STRETCH = 0.5, 0.15


class ImageClassifier(Classifier):
    """An image classifier with its image processor and the names of its classes.

    Args:
        network: A transformers ``...ForImageClassification`` of three channels.
        processor: The content of its preprocessor_config.json.

    Raises:
        ModelError: The images are prepared in a way that is not known here.
    """

    auto: ClassVar[Any] = AutoModelForImageClassification
    preprocessor: ImagePreprocessor

    def __init__(self, network: Any, processor: Mapping[str, Any]) -> None:
        # The layout in which CPUs convolve fastest, in training and in eager inference.
        network.to(memory_format=torch.channels_last)
        self.processor = complete(processor)
        super().__init__(network, ImagePreprocessor.from_transformers(self.processor))
        if getattr(network.config, "num_channels", 3) != 3:
            raise ModelError(
                f"{network.config.model_type}: it has {network.config.num_channels} channels; "
                "choose a model for images of three."
            )
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                # transformers' MobileNets took 0.997 over from TensorFlow, which counts the other
                # way round: evaluation would rest on the last batch alone.
                module.momentum = _MOMENTUM

    @classmethod
    def with_reader(cls, network: Any, folder: str) -> ImageClassifier:
        processor, _ = ImageProcessingMixin.get_image_processor_dict(folder)
        return cls(network, processor)

    def save_reader(self, folder: Path) -> None:
        text = json.dumps(self.processor, indent=2)
        (folder / _FILE).write_text(text, encoding="utf8")

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixels, float32 (batch, 3, height, width), to logits (batch, classes)."""
        return self.logits(pixel_values=pixel_values.to(self.network.dtype))

    def vary(self, encoded: Sequence[Pixels], random: np.random.Generator) -> list[Pixels]:
        """Each image as it might as well have been taken.

        Photographs are cropped and mirrored (Szegedy et al. 2015), by less than half of their
        area, because a network from scratch must see the thing itself. What has no colours may
        well be a letter, a digit or a scan, which a mirror would spoil: it moves a little.
        """
        return [
            _moved(image, random) if _is_grey(image) else _cropped(image, random)
            for image in encoded
        ]


def _is_grey(image: Pixels) -> bool:
    return bool((image == image[..., :1]).all())


def _moved(image: Pixels, random: np.random.Generator) -> Pixels:
    """Moved by at most an eighth of its edge, which is repeated where there is nothing."""
    height, width, _ = image.shape
    most = (max(1, height // _SHIFT), max(1, width // _SHIFT))
    down, right = random.integers(-np.asarray(most), np.asarray(most) + 1)
    rows = np.clip(np.arange(height) + down, 0, height - 1)
    columns = np.clip(np.arange(width) + right, 0, width - 1)
    moved: npt.NDArray[np.uint8] = image[rows[:, None], columns]
    return moved


def _cropped(image: Pixels, random: np.random.Generator) -> Pixels:
    """A part of it, stretched to the same size, in half of all cases mirrored."""
    height, width, _ = image.shape
    edge = np.sqrt(random.uniform(_LEAST_AREA, 1))
    ratio = np.exp(random.uniform(-_STRETCH, _STRETCH))
    part = np.minimum((width * edge * ratio, height * edge / ratio), (width, height))
    left, top = random.uniform(0, (width, height) - part)
    picture = Image.fromarray(image).resize(
        (width, height), Image.Resampling.BILINEAR, box=(left, top, left + part[0], top + part[1])
    )
    if random.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(picture)


def new_resnet(labels: Sequence[str], size: int) -> ImageClassifier:
    """A ResNet-18 (He et al. 2015) with random weights, half as wide for small images.

    Args:
        labels: Names of the classes.
        size: Height and width in pixels at which it looks at images.

    Raises:
        ModelError: The size is below what five halvings leave something of.
    """
    if size < _SMALLEST:
        raise ModelError(f"image_size is {size}; give {_SMALLEST} pixels or more.")
    width = 64 if size > _SMALL else 32
    config = ResNetConfig(
        embedding_size=width,
        hidden_sizes=[width, 2 * width, 4 * width, 8 * width],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        **_named(labels),
    )
    return _from_scratch(ResNetForImageClassification(config), _processor(size))


def new_mobilenet(teacher: ImageClassifier, *, width: float = 1.0) -> ImageClassifier:
    """A MobileNetV2 (Sandler et al. 2018) with random weights, that sees what the teacher sees.

    Args:
        teacher: The fine-tuned teacher; it is not changed.
        width: Multiplier of the channels.

    Raises:
        ModelError: The width is not above 0, or above 2.
    """
    if not 0 < width <= 2:
        raise ModelError(f"student_width is {width:g}; give a number above 0, up to 2.")
    edge = teacher.preprocessor.settings.height
    config = MobileNetV2Config(
        image_size=edge,
        depth_multiplier=width,
        # Small images keep a grid of places to look at, instead of one.
        output_stride=8 if edge <= _SMALL else 32,
        tf_padding=False,
        classifier_dropout_prob=0.1,
        **_named(teacher.labels),
    )
    return _from_scratch(MobileNetV2ForImageClassification(config), teacher.processor)


def _from_scratch(network: Any, processor: Mapping[str, Any]) -> ImageClassifier:
    """He et al. 2015's random weights, under which batch statistics start where they belong.

    Under transformers' own, fifty times smaller, a deep network's running statistics take
    hundreds of steps to get there, and it answers all images alike until then.
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
    """An image processor that stretches to size x size and brings values to -1 to 1."""
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
