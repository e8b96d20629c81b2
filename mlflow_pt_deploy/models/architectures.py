"""Where an architecture of texts keeps its parts: in the encoder, in each layer, in the config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlflow_pt_deploy.errors import ModelError


@dataclass(frozen=True)
class Family:
    """Names of modules, of a layer's from the layer on, and of config keys.

    Attributes:
        layers: The encoder's list of layers.
        attention: What computes a layer's attention.
        queries: Its layers for queries, keys and values; empty where heads cannot be removed.
        mixed: The layer that reads all heads side by side.
        up, down: The feed-forward layers.
        neurons: Config key: how wide the feed-forward layers are.
    """

    layers: str = "encoder.layer"
    attention: str = "attention.self"
    queries: tuple[str, ...] = ("query", "key", "value")
    mixed: str = "attention.output.dense"
    up: str = "intermediate.dense"
    down: str = "output.dense"
    neurons: str = "intermediate_size"


FAMILIES = dict.fromkeys(("bert", "camembert", "electra", "roberta", "xlm-roberta"), Family()) | {
    "distilbert": Family(
        layers="transformer.layer",
        attention="attention",
        queries=("q_lin", "k_lin", "v_lin"),
        mixed="attention.out_lin",
        up="ffn.lin1",
        down="ffn.lin2",
        neurons="hidden_dim",
    ),
    # its heads share a table of relative positions
    "mpnet": Family(attention="attention.attn", queries=(), mixed="attention.attn.o"),
}


def family_of(config: Any) -> Family:
    """The family of a transformers config.

    Raises:
        ModelError: It is not one of those that can be pruned.
    """
    kind = config.model_type
    if kind not in FAMILIES:
        raise ModelError(f"{kind} cannot be pruned; supported are {', '.join(FAMILIES)}.")
    return FAMILIES[kind]
