"""Create a student from some layers of a text classifier."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from mlflow_pt_deploy.errors import ModelError
from mlflow_pt_deploy.models.custom_head_size import blank_network
from mlflow_pt_deploy.models.text import TextClassifier


def shrink(teacher: TextClassifier, layers: Sequence[int]) -> TextClassifier:
    """Create a student with some of the teacher's layers, their weights and the head.

    Initialization from the teacher's layers follows DistilBERT (Sanh et al. 2019) and Patient
    Knowledge Distillation (Sun et al. 2019). The network is built from its own config, as when it
    is loaded, so that parts that depend on the layer index are right.

    Args:
        teacher: The fine-tuned teacher; not changed.
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
            f"{config.model_type}: no network can be built from layers {_format(layers)} of "
            f"{depth} ({_shorten(error)}). Keep other layers (--keep-layers). {_ALTERNATIVES}"
        ) from error
    student.to(network.dtype)
    return TextClassifier(student, teacher.tokenizer).eval()


_ALTERNATIVES = (
    "Train no student with layers (--student-epochs 0; the static student is still trained), or "
    "choose another teacher, e.g. minilm."
)


def _layers_name(network: Any, depth: int) -> str:
    """Name of the first module list whose length is the number of layers in the config."""
    for name, module in network.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return str(name)
    kind = f"{type(network).__name__} has no list of {depth} layers to choose from"
    shared = ": they share their weights" if hasattr(network.config, "num_hidden_groups") else ""
    raise ModelError(f"{kind}{shared}. {_ALTERNATIVES}")


def _cut_config(config: Any, layers: Sequence[int]) -> Any:
    """Copy the config for the kept layers; lists with one entry per layer are reduced too."""
    depth = config.num_hidden_layers
    cut = copy.deepcopy(config)
    for name, value in config.to_dict().items():
        per_layer = isinstance(value, list | tuple) and len(value) == depth
        if per_layer and ("layer" in name or "attention" in name or "window" in name):
            setattr(cut, name, [value[index] for index in layers])
    try:
        cut.num_hidden_layers = len(layers)
    except (NotImplementedError, AttributeError) as error:
        raise ModelError(
            f"{config.model_type}: its number of layers cannot be changed. {_ALTERNATIVES}"
        ) from error
    return cut


def _kept(
    state: dict[str, torch.Tensor], prefix: str, layers: Sequence[int]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights of the kept layers with new indices, and all weights outside of layers."""
    positions = {index: position for position, index in enumerate(layers)}
    for name, tensor in state.items():
        if not name.startswith(prefix):
            yield name, tensor
            continue
        number, _, rest = name.removeprefix(prefix).partition(".")
        if int(number) in positions:
            yield f"{prefix}{positions[int(number)]}.{rest}", tensor


def _format(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))


def _shorten(error: Exception) -> str:
    """The message of a library error on one line of at most 300 characters."""
    text = " ".join(str(error).split()).rstrip(".")
    text = re.sub(r"^Error\(s\) in loading state_dict for \w+: ", "", text)
    return text if len(text) < 300 else f"{text[:297]}..."
