"""Without the heads, neurons and dimensions that matter least, as many in every layer.

Ranking by a Taylor score follows Molchanov et al. (2019). A pruned classifier has lost accuracy
until it is trained again.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers.pytorch_utils import prune_linear_layer

from mlflow_pt_deploy.data import Split
from mlflow_pt_deploy.distill import kept_layers, start_student
from mlflow_pt_deploy.errors import ModelError
from mlflow_pt_deploy.models import Classifier, TextClassifier
from mlflow_pt_deploy.models.family import family_of
from mlflow_pt_deploy.models.narrow import HEAD_SIZE, blank_network, head_size, note_heads
from mlflow_pt_deploy.models.static import FREQUENT
from mlflow_pt_deploy.prune.importance import Importance, Scores, teacher_importance


def prune_neurons(classifier: TextClassifier, keep: int, importance: Importance) -> TextClassifier:
    """Keep only the most important feed-forward neurons.

    Args:
        classifier: The classifier to cut down; it is not changed.
        keep: Neurons of each layer to keep.
        importance: What `taylor_importance` gave for this classifier.

    Raises:
        ModelError: `keep` is out of range, the scores belong to another classifier, or the
            architecture is not supported.
    """
    family = family_of(classifier.network.config)
    network, layers = _copied(classifier)
    shape = len(layers), getattr(network.config, family.neurons)
    _check(keep, shape[1], "the neurons that a layer has", importance.neurons, shape)
    for layer, scores in zip(layers, importance.neurons, strict=True):
        best = _best(scores, keep)
        up, down = layer.get_submodule(family.up), layer.get_submodule(family.down)
        layer.set_submodule(family.up, prune_linear_layer(up, best))
        layer.set_submodule(family.down, prune_linear_layer(down, best, dim=1))
    setattr(network.config, family.neurons, keep)
    return TextClassifier(network, classifier.tokenizer).eval()


def prune_heads(classifier: TextClassifier, keep: int, importance: Importance) -> TextClassifier:
    """Keep only the most important attention heads, each as wide as it was (Michel et al. 2019).

    Args:
        classifier: The classifier to cut down; it is not changed.
        keep: Heads of each layer to keep.
        importance: What `taylor_importance` gave for this classifier.

    Raises:
        ModelError: As for `prune_neurons`.
    """
    config = classifier.network.config
    family = family_of(config)
    if not family.queries:
        raise ModelError(
            f"{config.model_type}'s heads cannot be removed one by one. Leave student_heads at 0."
        )
    network, layers = _copied(classifier)
    shape = len(layers), config.num_attention_heads
    _check(keep, shape[1], "the heads that a layer has", importance.heads, shape)
    size = head_size(network)
    for layer, scores in zip(layers, importance.heads, strict=True):
        attention = layer.get_submodule(family.attention)
        starts = (_best(scores, keep) * size).tolist()
        places = torch.LongTensor([start + place for start in starts for place in range(size)])
        for name in family.queries:
            setattr(attention, name, prune_linear_layer(getattr(attention, name), places))
        mixed = layer.get_submodule(family.mixed)
        layer.set_submodule(family.mixed, prune_linear_layer(mixed, places, dim=1))
    note_heads(network, keep, size)
    return TextClassifier(network, classifier.tokenizer).eval()


def prune_width(classifier: TextClassifier, keep: int, importance: Importance) -> TextClassifier:
    """Keep only the most important dimensions of the hidden states, the same in all layers.

    Follows the cut of the hidden size in "Sheared LLaMA" (Xia et al. 2023), by a score instead of a
    learned mask. Heads keep their number and width.

    Args:
        classifier: The classifier to cut down; it is not changed.
        keep: Dimensions to keep.
        importance: What `taylor_importance` gave for this classifier.

    Raises:
        ModelError: As for `prune_neurons`.
    """
    old = classifier.network
    if not family_of(old.config).queries:
        raise ModelError(
            f"{old.config.model_type}'s hidden states cannot be cut. Leave student_width at 1."
        )
    width = old.config.hidden_size
    _check(keep, width, "the dimensions of the hidden states", importance.width, (width,))
    size, config = head_size(old), copy.deepcopy(old.config)
    config.hidden_size = keep
    setattr(config, HEAD_SIZE, size)
    network = blank_network(TextClassifier.auto, config).to(old.device)
    note_heads(network, config.num_attention_heads, size)
    kept, weights = _best(importance.width, keep).to(old.device), old.state_dict()
    # Only what depends on the width has another shape now: there the kept dimensions are taken.
    network.load_state_dict(
        {
            name: _taken(weights[name], tensor.shape, kept)
            for name, tensor in network.state_dict().items()
        }
    )
    return TextClassifier(network, classifier.tokenizer).eval()


def new_student(
    teacher: Classifier,
    train: Split,
    layers: int,
    chosen: str = "",
    *,
    heads: int = 0,
    neurons: int = 0,
    width: float = 1.0,
    frequent: int = FREQUENT,
) -> Classifier:
    """What `distill.start_student` gives, cut down to the shape that is asked for.

    Args:
        teacher: The fine-tuned teacher.
        train: Rows to look at.
        layers, chosen: As there.
        heads, neurons: See `cut_student`; for transformers of texts alone.
        width: As there of images, see `cut_student` of texts.
        frequent: As there.

    Raises:
        ModelError: A number is out of range, or the architecture is not supported.
    """
    student = start_student(
        teacher, layers, chosen, width=width, rows=train.rows, frequent=frequent
    )
    if not layers or not isinstance(student, TextClassifier):
        return student
    assert isinstance(teacher, TextClassifier)
    kept = kept_layers(teacher.network.config.num_hidden_layers, layers, chosen)
    return cut_student(student, teacher, train, kept, heads=heads, neurons=neurons, width=width)


def cut_student(
    student: TextClassifier,
    teacher: TextClassifier,
    train: Split,
    layers: Sequence[int],
    *,
    heads: int = 0,
    neurons: int = 0,
    width: float = 1.0,
) -> TextClassifier:
    """A student that took over layers of its teacher, without what matters least in them.

    Args:
        student: What `distill.start_student` gave; it is not changed.
        teacher: The fine-tuned teacher, whose loss tells what matters.
        train: Rows to look at.
        layers: The layers that were taken over.
        heads, neurons: To keep in each layer; 0: all.
        width: Share of the hidden states' dimensions to keep, rounded to eights.

    Raises:
        ModelError: A number is out of range, or the architecture is not supported.
    """
    if not 0 < width <= 1:
        raise ModelError(
            f"student_width is {width:g}; give a share of the teacher's width, above 0 and up to 1."
        )
    if not heads and not neurons and width == 1:
        return student
    importance = teacher_importance(teacher, train, layers)
    if heads:
        student = prune_heads(student, heads, importance)
    if neurons:
        student = prune_neurons(student, neurons, importance)
    if width < 1:
        whole = student.network.config.hidden_size
        student = prune_width(student, max(1, round(width * whole / 8)) * 8, importance)
    return student


def _copied(classifier: TextClassifier) -> tuple[Any, Any]:
    """The network and its list of layers."""
    network = copy.deepcopy(classifier.network)
    return network, network.base_model.get_submodule(family_of(network.config).layers)


def _check(keep: int, most: int, what: str, scores: Scores, shape: tuple[int, ...]) -> None:
    if not 1 <= keep <= most:
        raise ModelError(f"keep {keep}: choose from 1 to {most}, {what}.")
    if scores.shape != shape:
        raise ModelError(
            f"importance has scores of shape {scores.shape}, the classifier has {shape}. Give what "
            "taylor_importance returns for this classifier."
        )


def _best(scores: Scores, keep: int) -> torch.LongTensor:
    """Places of the highest scores, in their order."""
    return torch.LongTensor(sorted(np.argsort(-scores, kind="stable")[:keep].tolist()))


def _taken(tensor: torch.Tensor, shape: Sequence[int], kept: torch.Tensor) -> torch.Tensor:
    for dim, length in enumerate(shape):
        if tensor.shape[dim] != length:
            tensor = tensor.index_select(dim, kept)
    return tensor
