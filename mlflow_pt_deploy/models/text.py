"""Text classifiers of the transformers library, with their tokenizer.

Does not know how a model is trained or what runs it later.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from mlflow_pt_deploy.models.base import Classifier
from mlflow_pt_deploy.preprocess import TextPreprocessor


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
