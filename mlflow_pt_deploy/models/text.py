"""Text classifiers of the transformers library: with their tokenizer, and cut down.

Does not know how a model is trained or what runs it later.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from mlflow_pt_deploy.errors import ModelError
from mlflow_pt_deploy.models.base import Classifier
from mlflow_pt_deploy.preprocessing import TextPreprocessor


class TextClassifier(Classifier):
    """A sequence classifier with its tokenizer and the names of its classes.

    Args:
        network: A transformers ``...ForSequenceClassification``.
        tokenizer: The fast tokenizer that belongs to it.
    """

    auto: ClassVar[Any] = AutoModelForSequenceClassification
    preprocessor: TextPreprocessor

    def __init__(self, network: Any, tokenizer: Any) -> None:
        positions = getattr(network.config, "max_position_embeddings", 512)
        padding = getattr(network.config, "pad_token_id", 0) or 0
        if network.config.model_type in {"roberta", "xlm-roberta", "camembert", "mpnet"}:
            positions -= padding + 1  # their positions start behind the padding index
        super().__init__(network, TextPreprocessor.from_transformers(tokenizer, positions))
        self.tokenizer = tokenizer

    @classmethod
    def with_reader(cls, network: Any, folder: str) -> TextClassifier:
        return cls(network, AutoTokenizer.from_pretrained(folder))

    def save_reader(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Token ids and mask, int64 (batch, length), to logits (batch, classes)."""
        return self.logits(input_ids=input_ids, attention_mask=attention_mask)


def shrink(teacher: TextClassifier, layers: Sequence[int]) -> TextClassifier:
    """A student that keeps only some of the teacher's layers, weights and head included.

    Initialising from the teacher's own layers follows DistilBERT (Sanh et al. 2019) and
    Patient Knowledge Distillation (Sun et al. 2019).

    Args:
        teacher: The fine-tuned teacher; it is not changed.
        layers: Indices of the layers to keep, ascending.

    Raises:
        ModelError: An index is out of range, or the network has no list of layers.
    """
    depth = teacher.network.config.num_hidden_layers
    if not layers or any(not 0 <= index < depth for index in layers):
        raise ModelError(f"student layers {list(layers)}: choose from 0 to {depth - 1}.")
    network = copy.deepcopy(teacher.network)
    for module in network.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == depth:
                setattr(module, name, nn.ModuleList(child[index] for index in layers))
                network.config.num_hidden_layers = len(layers)
                return TextClassifier(network, teacher.tokenizer).eval()
    raise ModelError(f"{type(network).__name__} has no list of {depth} layers to choose from.")
