"""Structured pruning: remove the least important heads, neurons and hidden dimensions.

Every layer keeps the same number of parts. Ranking by a Taylor score follows Molchanov et al.
(2019). A pruned classifier needs further training to recover its accuracy.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers.pytorch_utils import prune_linear_layer

from mlflow_pt_deploy.data import Split
from mlflow_pt_deploy.errors import ModelError
from mlflow_pt_deploy.models import Classifier, TextClassifier
from mlflow_pt_deploy.models.architectures import family_of
from mlflow_pt_deploy.models.custom_head_size import HEAD_SIZE, blank_network, head_size, set_heads
from mlflow_pt_deploy.models.static import FREQUENT
from mlflow_pt_deploy.pruning.importance import Importance, Scores, teacher_importance
from mlflow_pt_deploy.training.distillation import kept_layers, start_student


def prune_neurons(classifier: TextClassifier, keep: int, importance: Importance) -> TextClassifier:
    """Keep only the most important feed-forward neurons.

    Args:
        classifier: The classifier to prune; it is not changed.
        keep: Number of neurons to keep in each layer.
        importance: Result of `taylor_importance` for this classifier.

    Raises:
        ModelError: `keep` is out of range, the scores belong to another classifier, or the
            architecture is not supported.
    """
    family = family_of(classifier.network.config)
    network, layers = _copy_network(classifier)
    shape = len(layers), getattr(network.config, family.neurons)
    _check_keep(keep, shape[1], "the number of neurons per layer", importance.neurons, shape)
    for layer, scores in zip(layers, importance.neurons, strict=True):
        kept = _top_indices(scores, keep)
        up, down = layer.get_submodule(family.up), layer.get_submodule(family.down)
        layer.set_submodule(family.up, prune_linear_layer(up, kept))
        layer.set_submodule(family.down, prune_linear_layer(down, kept, dim=1))
    setattr(network.config, family.neurons, keep)
    return TextClassifier(network, classifier.tokenizer).eval()


def prune_heads(classifier: TextClassifier, keep: int, importance: Importance) -> TextClassifier:
    """Keep only the most important attention heads (Michel et al. 2019); the head size is kept.

    Args:
        classifier: The classifier to prune; it is not changed.
        keep: Number of heads to keep in each layer.
        importance: Result of `taylor_importance` for this classifier.

    Raises:
        ModelError: See `prune_neurons`.
    """
    config = classifier.network.config
    family = family_of(config)
    if not family.queries:
        raise ModelError(
            f"pruning heads of {config.model_type} is not supported. Leave student_heads at 0."
        )
    network, layers = _copy_network(classifier)
    shape = len(layers), config.num_attention_heads
    _check_keep(keep, shape[1], "the number of heads per layer", importance.heads, shape)
    size = head_size(network)
    for layer, scores in zip(layers, importance.heads, strict=True):
        attention = layer.get_submodule(family.attention)
        starts = (_top_indices(scores, keep) * size).tolist()
        indices = torch.LongTensor([start + offset for start in starts for offset in range(size)])
        for name in family.queries:
            setattr(attention, name, prune_linear_layer(getattr(attention, name), indices))
        mixed = layer.get_submodule(family.mixed)
        layer.set_submodule(family.mixed, prune_linear_layer(mixed, indices, dim=1))
    set_heads(network, keep, size)
    return TextClassifier(network, classifier.tokenizer).eval()


def prune_width(classifier: TextClassifier, keep: int, importance: Importance) -> TextClassifier:
    """Keep only the most important hidden dimensions, the same ones in all layers.

    Follows the pruning of the hidden size in "Sheared LLaMA" (Xia et al. 2023), with a score
    instead of a learned mask. The number and size of the heads do not change.

    Args:
        classifier: The classifier to prune; it is not changed.
        keep: Number of dimensions to keep.
        importance: Result of `taylor_importance` for this classifier.

    Raises:
        ModelError: See `prune_neurons`.
    """
    old = classifier.network
    if not family_of(old.config).queries:
        raise ModelError(
            f"pruning the hidden size of {old.config.model_type} is not supported. Leave "
            "student_width at 1."
        )
    width = old.config.hidden_size
    _check_keep(keep, width, "the hidden size", importance.width, (width,))
    size, config = head_size(old), copy.deepcopy(old.config)
    config.hidden_size = keep
    setattr(config, HEAD_SIZE, size)
    network = blank_network(TextClassifier.auto, config).to(old.device)
    set_heads(network, config.num_attention_heads, size)
    kept, weights = _top_indices(importance.width, keep).to(old.device), old.state_dict()
    # Only tensors that depend on the hidden size change their shape.
    network.load_state_dict(
        {
            name: _select(weights[name], tensor.shape, kept)
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
    """Create an untrained student with `start_student` and prune it to the requested shape.

    Args:
        teacher: The fine-tuned teacher.
        train: Training rows.
        layers, chosen, frequent: See `start_student`.
        heads, neurons: See `cut_student`; ignored for static students and images.
        width: See `cut_student` for texts and `start_student` for images.

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
    """Prune the least important parts of a student that was made from its teacher's layers.

    Args:
        student: Result of `start_student`; it is not changed.
        teacher: The fine-tuned teacher, which the importance scores are computed on.
        train: Training rows.
        layers: Indices of the teacher's layers that the student has.
        heads, neurons: Number to keep in each layer; 0 keeps all.
        width: Share of the hidden dimensions to keep, rounded to a multiple of 8.

    Raises:
        ModelError: A number is out of range, or the architecture is not supported.
    """
    if not 0 < width <= 1:
        raise ModelError(
            f"student_width is {width:g}; give a share of the teacher's width above 0, up to 1."
        )
    if not heads and not neurons and width == 1:
        return student
    importance = teacher_importance(teacher, train, layers)
    if heads:
        student = prune_heads(student, heads, importance)
    if neurons:
        student = prune_neurons(student, neurons, importance)
    if width < 1:
        hidden = student.network.config.hidden_size
        student = prune_width(student, max(1, round(width * hidden / 8)) * 8, importance)
    return student


def _copy_network(classifier: TextClassifier) -> tuple[Any, Any]:
    """Return a copy of the network and its list of layers."""
    network = copy.deepcopy(classifier.network)
    return network, network.base_model.get_submodule(family_of(network.config).layers)


def _check_keep(keep: int, maximum: int, what: str, scores: Scores, shape: tuple[int, ...]) -> None:
    if not 1 <= keep <= maximum:
        raise ModelError(f"keep {keep}: choose from 1 to {maximum}, {what}.")
    if scores.shape != shape:
        raise ModelError(
            f"importance has scores of shape {scores.shape}, but the classifier has {shape}. Give "
            "the result of taylor_importance for this classifier."
        )


def _top_indices(scores: Scores, keep: int) -> torch.LongTensor:
    """Indices of the highest scores, ascending, int64 (keep,)."""
    return torch.LongTensor(sorted(np.argsort(-scores, kind="stable")[:keep].tolist()))


def _select(tensor: torch.Tensor, shape: Sequence[int], kept: torch.Tensor) -> torch.Tensor:
    for dim, length in enumerate(shape):
        if tensor.shape[dim] != length:
            tensor = tensor.index_select(dim, kept)
    return tensor
