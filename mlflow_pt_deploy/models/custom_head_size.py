"""Networks of texts whose heads, side by side, are not as wide as their hidden states.

The BERT family derives the width of a head from its config (``hidden_size / num_attention_heads``).
After heads, or dimensions of the hidden states, were removed that is wrong; config.json then has
one more key, and transformers alone refuses the folder for its shapes instead of answering wrongly.
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
    """Whether only this module can build a config's network."""
    return hasattr(config, HEAD_SIZE)


def blank_network(auto: Any, config: Any) -> Any:
    """A network of a config's shape, with random weights.

    Args:
        auto: transformers' Auto class of such networks.
        config: A transformers config; it is not changed.
    """
    if not has_custom_head_size(config):
        return auto.from_config(config)
    heads, size = config.num_attention_heads, getattr(config, HEAD_SIZE)
    fitting = copy.deepcopy(config)
    fitting.num_attention_heads = 1  # every width is a multiple of it
    network = auto.from_config(fitting)
    width, family = config.hidden_size, family_of(config)
    for layer in network.base_model.get_submodule(family.layers):
        attention = layer.get_submodule(family.attention)
        for name in family.queries:
            setattr(attention, name, nn.Linear(width, heads * size))
        layer.set_submodule(family.mixed, nn.Linear(heads * size, width))
    set_heads(network, heads, size)
    return network


def set_heads(network: Any, heads: int, size: int) -> None:
    """Tell a network how many heads its attention has by now, and how wide each is."""
    config, family = network.config, family_of(network.config)
    config.num_attention_heads = heads
    if heads * size == config.hidden_size:
        config.__dict__.pop(HEAD_SIZE, None)
    else:
        setattr(config, HEAD_SIZE, size)
    for layer in network.base_model.get_submodule(family.layers):
        attention = layer.get_submodule(family.attention)
        known = {"num_attention_heads": heads, "n_heads": heads, "attention_head_size": size}
        known |= {"all_head_size": heads * size, "scaling": size**-0.5}
        for name, value in known.items():
            if hasattr(attention, name):
                setattr(attention, name, value)


def head_size(network: Any) -> int:
    """How wide a head is."""
    config = network.config
    derived = config.hidden_size // config.num_attention_heads
    return int(getattr(config, HEAD_SIZE, derived))


def load_custom_head_size(auto: Any, config: Any, folder: Path) -> tuple[Any, list[str]]:
    """The network of a folder, and names of weights that its files lack or have in another shape.

    Raises:
        OSError: The weights cannot be read.
        SafetensorError: They are damaged.
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
