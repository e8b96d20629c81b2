"""Text classifiers: transformers models with their tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from mlflow_pt_deploy.errors import ModelError, root_cause
from mlflow_pt_deploy.models.base import Classifier
from mlflow_pt_deploy.models.positions import longest_text
from mlflow_pt_deploy.preprocessing import TextPreprocessor


class TextClassifier(Classifier):
    """A text classifier with its tokenizer.

    Args:
        network: A transformers ``...ForSequenceClassification``.
        tokenizer: The fast tokenizer of the network.
    """

    auto: ClassVar[Any] = AutoModelForSequenceClassification
    preprocessor: TextPreprocessor

    def __init__(self, network: Any, tokenizer: Any) -> None:
        padding = declared_padding(network.config)
        if padding is None and tokenizer.pad_token_id is not None:
            # Decoders use the padding id of the config to find the last token of a row.
            network.config.pad_token_id = tokenizer.pad_token_id
        longest = longest_text(network, tokenizer)
        super().__init__(network, TextPreprocessor.from_transformers(tokenizer, longest, padding))
        self.tokenizer = tokenizer

    @classmethod
    def with_processor(cls, network: Any, folder: str) -> TextClassifier:
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
        except Exception as error:  # transformers, tokenizers and sentencepiece differ
            raise ModelError(
                f"{folder}: its tokenizer cannot be loaded ({root_cause(error)}). Save the "
                "tokenizer in the folder with tokenizer.save_pretrained, which writes "
                "tokenizer.json."
            ) from error
        return cls(network, tokenizer)

    def save_processor(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Token ids and mask, int64 (batch, length), to logits (batch, classes)."""
        return self.logits(input_ids=input_ids, attention_mask=attention_mask)


def declared_padding(config: Any) -> int | None:
    """Padding id in the config of a network, or None."""
    padding = getattr(config, "pad_token_id", None)
    return padding if isinstance(padding, int) and padding >= 0 else None
