"""A text classifier with only some of its layers."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from mlflow_pt_deploy.errors import ModelError
from mlflow_pt_deploy.models.narrow import blank_network
from mlflow_pt_deploy.models.text import TextClassifier


def shrink(teacher: TextClassifier, layers: Sequence[int]) -> TextClassifier:
    """A student that keeps only some of the teacher's layers, weights and head included.

    Initialising from the teacher's own layers follows DistilBERT (Sanh et al. 2019) and
    Patient Knowledge Distillation (Sun et al. 2019). The network is built from a config of its own,
    as it will be when it is loaded: what its architecture does by a layer's number is right then.

    Args:
        teacher: The fine-tuned teacher; it is not changed.
        layers: Indices of the layers to keep, ascending.

    Raises:
        ModelError: An index is out of range, or layers of this architecture cannot be removed.
    """
    network = teacher.network
    depth = network.config.num_hidden_layers
    if not layers or any(not 0 <= index < depth for index in layers):
        raise ModelError(f"student layers {list(layers)}: choose from 0 to {depth - 1}.")
    prefix = _layers_name(network, depth)
    config = _cut_config(network.config, layers)
    try:
        with torch.random.fork_rng():
            student = blank_network(TextClassifier.auto, config).to(network.device)
        student.load_state_dict(dict(_kept(network.state_dict(), f"{prefix}.", layers)))
    except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
        raise ModelError(
            f"{config.model_type}: of its {depth} layers, {_listed(layers)} alone make no network "
            f"({_short(error)}). Keep other layers (--keep-layers), {_ELSE}"
        ) from error
    student.to(network.dtype)
    return TextClassifier(student, teacher.tokenizer).eval()


_ELSE = (
    "have no student with layers (--student-epochs 0; the static student is made all the same), or "
    "take another teacher, e.g. minilm."
)


def _layers_name(network: Any, depth: int) -> str:
    """Name of the first list of as many modules as the config says that there are layers."""
    for name, module in network.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return str(name)
    kind = f"{type(network).__name__} has no list of {depth} layers to choose from"
    shared = ": they share their weights" if hasattr(network.config, "num_hidden_groups") else ""
    raise ModelError(f"{kind}{shared}. {_ELSE.capitalize()}")


def _cut_config(config: Any, layers: Sequence[int]) -> Any:
    """The config of as many layers; lists with an entry for each layer are cut along."""
    depth = config.num_hidden_layers
    cut = copy.deepcopy(config)
    for name, value in config.to_dict().items():
        a_layer_each = isinstance(value, list | tuple) and len(value) == depth
        if a_layer_each and ("layer" in name or "attention" in name or "window" in name):
            setattr(cut, name, [value[index] for index in layers])
    try:
        cut.num_hidden_layers = len(layers)
    except (NotImplementedError, AttributeError) as error:
        raise ModelError(
            f"{config.model_type}: its number of layers cannot be changed. {_ELSE.capitalize()}"
        ) from error
    return cut


def _kept(
    state: dict[str, torch.Tensor], prefix: str, layers: Sequence[int]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights of the layers that stay, under their new numbers, and all that is in no layer."""
    places = {index: place for place, index in enumerate(layers)}
    for name, tensor in state.items():
        if not name.startswith(prefix):
            yield name, tensor
            continue
        number, _, rest = name.removeprefix(prefix).partition(".")
        if int(number) in places:
            yield f"{prefix}{places[int(number)]}.{rest}", tensor


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))


def _short(error: Exception) -> str:
    """A library's message on one line; of weights that do not fit, which ones."""
    said = " ".join(str(error).split()).rstrip(".")
    said = re.sub(r"^Error\(s\) in loading state_dict for \w+: ", "", said)
    return said if len(said) < 300 else f"{said[:297]}..."
