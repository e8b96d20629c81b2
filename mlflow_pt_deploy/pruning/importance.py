"""Importance scores of attention heads, feed-forward neurons and hidden dimensions."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from mlflow_pt_deploy.data import Split
from mlflow_pt_deploy.errors import DataError
from mlflow_pt_deploy.models import TextClassifier
from mlflow_pt_deploy.models.architectures import family_of
from mlflow_pt_deploy.system import interrupt

Scores = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Importance:
    """Importance of each part of a classifier; 0 means that the loss does not depend on it.

    Attributes:
        heads: Scores of the attention heads, float64 (layers, heads).
        neurons: Scores of the feed-forward neurons, float64 (layers, intermediate).
        width: Scores of the hidden dimensions, summed over the layers, float64 (hidden,).
    """

    heads: Scores
    neurons: Scores
    width: Scores


def taylor_importance(
    classifier: TextClassifier,
    rows: Sequence[str],
    targets: npt.NDArray[np.int64],
    *,
    batch_size: int = 32,
) -> Importance:
    """Compute first-order Taylor scores, which estimate the change of the loss without a part.

    Each part is multiplied by a gate of 1. Its score is the absolute gradient of a row's cross
    entropy with respect to that gate, averaged over the rows (Michel, Levy & Neubig 2019 for heads,
    Molchanov et al. 2019 for neurons). A hidden dimension has one gate after each layer norm; its
    scores are summed.

    Args:
        classifier: The classifier to score; it is not changed.
        rows: Texts, usually of train.
        targets: Labels of the texts, int64 (rows,).
        batch_size: Rows per batch.

    Raises:
        DataError: There are no rows, or the number of labels differs.
        ModelError: The architecture is not supported.
    """
    if not rows or len(rows) != len(targets):
        raise DataError(f"{len(rows)} rows with {len(targets)} labels: give one label for each.")
    network = copy.deepcopy(classifier.network).eval().requires_grad_(False)
    gates = _Gates(network)
    total: list[Scores] = [np.zeros(1) for _ in gates.groups]
    for start in range(0, len(rows), batch_size):
        interrupt.check()
        inputs = classifier.preprocessor(rows[start : start + batch_size])
        tensors = {name: torch.from_numpy(it).to(network.device) for name, it in inputs.items()}
        truth = torch.from_numpy(targets[start : start + batch_size]).to(network.device)
        gates.clear()
        loss = functional.cross_entropy(network(**tensors).logits, truth, reduction="sum")
        total = [old + new for old, new in zip(total, gates.scores(loss), strict=True)]
    heads, neurons, width = (scores / len(rows) for scores in total)
    return Importance(heads, neurons, width.sum(axis=0))


def teacher_importance(
    teacher: TextClassifier, train: Split, layers: Sequence[int], *, rows: int = 1024
) -> Importance:
    """Compute `taylor_importance` of a teacher for the layers that a student keeps.

    Args:
        teacher: The fine-tuned teacher; it is not changed.
        train: Rows to sample from.
        layers: Layer indices.
        rows: Number of rows to sample.
    """
    sample = np.random.default_rng(0).permutation(len(train))[:rows]
    texts = [str(train.rows[i]) for i in sample]
    scores = taylor_importance(teacher, texts, train.targets[sample])
    kept = list(layers)
    return Importance(scores.heads[kept], scores.neurons[kept], scores.width)


class _Gates:
    """Forward hooks that multiply heads, neurons and hidden dimensions by gates of 1, per row."""

    def __init__(self, network: Any) -> None:
        config, body = network.config, network.base_model
        family = family_of(config)
        heads, neurons, width = self.groups = [list[torch.Tensor]() for _ in range(3)]
        for layer in body.get_submodule(family.layers):
            self._gate_input(layer.get_submodule(family.mixed), config.num_attention_heads, heads)
            down = layer.get_submodule(family.down)
            self._gate_input(down, getattr(config, family.neurons), neurons)
        hidden = config.hidden_size
        for module in body.modules():
            if isinstance(module, nn.LayerNorm) and module.normalized_shape == (hidden,):
                self._gate_output(module, hidden, width)

    def clear(self) -> None:
        """Drop the gates of the last batch."""
        for group in self.groups:
            group.clear()

    def scores(self, loss: torch.Tensor) -> list[Scores]:
        """Scores of each group, summed over the rows of `loss`, float64 (layers, parts)."""
        gates = [gate for group in self.groups for gate in group]
        gradients = iter(torch.autograd.grad(loss, gates))
        stacked = [torch.stack([next(gradients) for _ in group]) for group in self.groups]
        return [each.abs().sum(dim=(1, 2, 4)).double().cpu().numpy() for each in stacked]

    @staticmethod
    def _gate_input(module: nn.Module, parts: int, gates: list[torch.Tensor]) -> None:
        def multiply(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            return (_apply_gates(inputs[0], parts, gates),)

        module.register_forward_pre_hook(multiply)

    @staticmethod
    def _gate_output(module: nn.Module, parts: int, gates: list[torch.Tensor]) -> None:
        def multiply(_: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
            return _apply_gates(output, parts, gates)

        module.register_forward_hook(multiply)


def _apply_gates(values: torch.Tensor, parts: int, gates: list[torch.Tensor]) -> torch.Tensor:
    """Multiply values (batch, length, width) by a new gate, float (batch, 1, parts, 1)."""
    gate = values.new_ones(len(values), 1, parts, 1, requires_grad=True)
    gates.append(gate)
    return cast(torch.Tensor, (values.unflatten(-1, (parts, -1)) * gate).flatten(-2))
