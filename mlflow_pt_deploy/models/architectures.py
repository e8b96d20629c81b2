"""Names of layers, heads and neurons in the text architectures that can be pruned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlflow_pt_deploy.errors import ModelError


@dataclass(frozen=True)
class Family:
    """Module names and config keys of an architecture family.

    All names except `layers` are relative to a layer.

    Attributes:
        layers: The encoder's list of layers.
        attention: The attention module.
        queries: Query, key and value layers of `attention`; empty if heads cannot be removed.
        mixed: Output projection of the concatenated heads.
        up, down: Feed-forward layers.
        neurons: Config key of the width of the feed-forward layers.
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
    """Return the family of a transformers config.

    Raises:
        ModelError: The architecture cannot be pruned.
    """
    kind = config.model_type
    if kind not in FAMILIES:
        raise ModelError(f"{kind} cannot be pruned; supported are {', '.join(FAMILIES)}.")
    return FAMILIES[kind]
