"""Makers for the pruning tests: random networks, reloading and comparing classifiers."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from mlflow_pt_deploy.models import TextClassifier, save_classifier

ROWS = ("my card", "please refund it today", "wire", "send money abroad to the new payee, please")


def random_network(kind: str, **changes: object) -> nn.Module:
    """A random network: 2 layers, 32 wide, 4 heads, 64 neurons; `tiny_model`'s ids fit."""
    changes["hidden_dim" if kind == "distilbert" else "intermediate_size"] = 64
    changes |= {"vocab_size": 188, "max_position_embeddings": 100, "hidden_size": 32}
    changes |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(kind, **{"pad_token_id": 0} | changes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_config(config).eval()


def reloaded(classifier: TextClassifier, folder: Path) -> TextClassifier:
    """Save a classifier and load it with plain transformers."""
    save_classifier(classifier, folder)
    network, info = AutoModelForSequenceClassification.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info.values())
    return TextClassifier(network, AutoTokenizer.from_pretrained(folder)).eval()


def weights(classifier: TextClassifier) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in classifier.state_dict().items()}


def is_unchanged(classifier: TextClassifier, before: dict[str, torch.Tensor]) -> bool:
    after = classifier.state_dict()
    return after.keys() == before.keys() and all(map(torch.equal, after.values(), before.values()))
