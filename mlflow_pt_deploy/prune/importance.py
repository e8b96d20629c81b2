"""How much the loss depends on a classifier's heads, neurons and dimensions."""

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

from mlflow_pt_deploy import interrupt
from mlflow_pt_deploy.data import Split
from mlflow_pt_deploy.errors import DataError
from mlflow_pt_deploy.models import TextClassifier
from mlflow_pt_deploy.models.family import family_of

Scores = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Importance:
    """How much the loss depends on each part of a classifier; 0 is not at all.

    Attributes:
        heads: Scores of attention heads, float64 (layers, heads).
        neurons: Scores of feed-forward neurons, float64 (layers, intermediate).
        width: Scores of the hidden states' dimensions, float64 (hidden,), all layers together.
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
    """First-order Taylor scores: what the loss would change by without a part.

    Each part is multiplied by a gate of 1; its score is the absolute gradient of a row's cross
    entropy by that gate, averaged over the rows (Michel, Levy & Neubig 2019 for heads, Molchanov et
    al. 2019 for neurons). A dimension has a gate behind each layer norm, and the sum of its scores.

    Args:
        classifier: The classifier to judge; it is not changed.
        rows: Texts, usually of train.
        targets: Their labels, int64 (rows,).
        batch_size: Rows at once.

    Raises:
        DataError: There are no rows, or not one label for each.
        ModelError: The architecture is not supported.
    """
    if not rows or len(rows) != len(targets):
        raise DataError(f"{len(rows)} rows with {len(targets)} labels: give one label for each.")
    network = copy.deepcopy(classifier.network).eval().requires_grad_(False)
    gates = _Gates(network)
    total: list[Scores] = [np.zeros(1) for _ in gates.kinds]
    for start in range(0, len(rows), batch_size):
        interrupt.check()
        inputs = classifier.preprocessor(rows[start : start + batch_size])
        tensors = {name: torch.from_numpy(it).to(network.device) for name, it in inputs.items()}
        truth = torch.from_numpy(targets[start : start + batch_size]).to(network.device)
        gates.clear()
        loss = functional.cross_entropy(network(**tensors).logits, truth, reduction="sum")
        total = [before + found for before, found in zip(total, gates.scores(loss), strict=True)]
    heads, neurons, width = (scores / len(rows) for scores in total)
    return Importance(heads, neurons, width.sum(axis=0))


def teacher_importance(
    teacher: TextClassifier, train: Split, layers: Sequence[int], *, rows: int = 1024
) -> Importance:
    """Scores of the teacher's parts in the layers that a student takes over.

    Args:
        teacher: The fine-tuned teacher; it is not changed.
        train: Rows to draw from.
        layers: Indices of the layers.
        rows: How many to draw.
    """
    drawn = np.random.default_rng(0).permutation(len(train))[:rows]
    texts = [str(train.rows[i]) for i in drawn]
    found = taylor_importance(teacher, texts, train.targets[drawn])
    kept = list(layers)
    return Importance(found.heads[kept], found.neurons[kept], found.width)


class _Gates:
    """Ones that a network's heads, neurons and dimensions are multiplied by, a set for each row."""

    def __init__(self, network: Any) -> None:
        config, body = network.config, network.base_model
        family = family_of(config)
        heads, neurons, width = self.kinds = [list[torch.Tensor]() for _ in range(3)]
        for layer in body.get_submodule(family.layers):
            self._before(layer.get_submodule(family.mixed), config.num_attention_heads, heads)
            down = layer.get_submodule(family.down)
            self._before(down, getattr(config, family.neurons), neurons)
        hidden = config.hidden_size
        for module in body.modules():
            if isinstance(module, nn.LayerNorm) and module.normalized_shape == (hidden,):
                self._behind(module, hidden, width)

    def clear(self) -> None:
        """Forget the last rows."""
        for kind in self.kinds:
            kind.clear()

    def scores(self, loss: torch.Tensor) -> list[Scores]:
        """Of each kind, summed over the rows of `loss`, (places, parts)."""
        gates = [gate for kind in self.kinds for gate in kind]
        gradients = iter(torch.autograd.grad(loss, gates))
        found = [torch.stack([next(gradients) for _ in kind]) for kind in self.kinds]
        return [each.abs().sum(dim=(1, 2, 4)).double().cpu().numpy() for each in found]

    @staticmethod
    def _before(module: nn.Module, groups: int, gates: list[torch.Tensor]) -> None:
        def multiply(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            return (_gated(inputs[0], groups, gates),)

        module.register_forward_pre_hook(multiply)

    @staticmethod
    def _behind(module: nn.Module, groups: int, gates: list[torch.Tensor]) -> None:
        def multiply(_: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
            return _gated(output, groups, gates)

        module.register_forward_hook(multiply)


def _gated(values: torch.Tensor, groups: int, gates: list[torch.Tensor]) -> torch.Tensor:
    """Values (batch, length, width) times ones, float (batch, 1, groups, 1), put into `gates`."""
    gate = values.new_ones(len(values), 1, groups, 1, requires_grad=True)
    gates.append(gate)
    return cast(torch.Tensor, (values.unflatten(-1, (groups, -1)) * gate).flatten(-2))
