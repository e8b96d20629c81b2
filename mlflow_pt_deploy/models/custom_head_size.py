"""Text networks whose head size differs from ``hidden_size / num_attention_heads``.

The BERT family derives the head size from its config. After pruning of heads or hidden dimensions
this is wrong, so config.json gets an additional key. Plain transformers rejects such a folder
because of its shapes; it never returns wrong results.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from mlflow_pt_deploy.models.architectures import family_of

HEAD_SIZE = "pt_deploy_head_size"


def has_custom_head_size(config: Any) -> bool:
    """Whether a config needs `blank_network` of this module."""
    return hasattr(config, HEAD_SIZE)


def blank_network(auto: Any, config: Any) -> Any:
    """Create a network with random weights.

    Args:
        auto: The transformers Auto class of the network.
        config: A transformers config; not changed.
    """
    if not has_custom_head_size(config):
        return auto.from_config(config)
    heads, size = config.num_attention_heads, getattr(config, HEAD_SIZE)
    valid = copy.deepcopy(config)
    valid.num_attention_heads = 1  # divides every width
    network = auto.from_config(valid)
    width, family = config.hidden_size, family_of(config)
    for layer in network.base_model.get_submodule(family.layers):
        attention = layer.get_submodule(family.attention)
        for name in family.queries:
            setattr(attention, name, nn.Linear(width, heads * size))
        layer.set_submodule(family.mixed, nn.Linear(heads * size, width))
    set_heads(network, heads, size)
    return network


def set_heads(network: Any, heads: int, size: int) -> None:
    """Set the number and size of heads in the config and the attention modules of a network."""
    config, family = network.config, family_of(network.config)
    config.num_attention_heads = heads
    if heads * size == config.hidden_size:
        config.__dict__.pop(HEAD_SIZE, None)
    else:
        setattr(config, HEAD_SIZE, size)
    for layer in network.base_model.get_submodule(family.layers):
        attention = layer.get_submodule(family.attention)
        values = {"num_attention_heads": heads, "n_heads": heads, "attention_head_size": size}
        values |= {"all_head_size": heads * size, "scaling": size**-0.5}
        for name, value in values.items():
            if hasattr(attention, name):
                setattr(attention, name, value)


def head_size(network: Any) -> int:
    """Width of an attention head."""
    config = network.config
    derived = config.hidden_size // config.num_attention_heads
    return int(getattr(config, HEAD_SIZE, derived))


def load_custom_head_size(auto: Any, config: Any, folder: Path) -> tuple[Any, list[str]]:
    """Load the network of a folder.

    Returns:
        The network, and the names of weights that are missing or have a wrong shape.

    Raises:
        OSError: The weights cannot be read.
        SafetensorError: The weights are damaged.
    """
    network = blank_network(auto, config)
    wanted, found = network.state_dict(), load_file(folder / "model.safetensors")
    usable = {
        name: tensor.to(torch.float32) if tensor.is_floating_point() else tensor
        for name, tensor in found.items()
        if name in wanted and tensor.shape == wanted[name].shape
    }
    missing, _ = network.load_state_dict(usable, strict=False)
    return network.eval(), missing
