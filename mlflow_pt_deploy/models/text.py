"""Text classifiers of the transformers library, with their tokenizer.

Does not know how a model is trained or what runs it later.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from mlflow_pt_deploy.errors import ModelError, first_line
from mlflow_pt_deploy.models.base import Classifier
from mlflow_pt_deploy.models.positions import longest_text
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
        padding = declared_padding(network.config)
        if padding is None and tokenizer.pad_token_id is not None:
            # Decoders find a row's last token by their config's padding.
            network.config.pad_token_id = tokenizer.pad_token_id
        longest = longest_text(network, tokenizer)
        super().__init__(network, TextPreprocessor.from_transformers(tokenizer, longest, padding))
        self.tokenizer = tokenizer

    @classmethod
    def with_reader(cls, network: Any, folder: str) -> TextClassifier:
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
        except Exception as error:  # transformers, tokenizers, sentencepiece: each has its own
            raise ModelError(
                f"{folder}: its tokenizer cannot be loaded ({first_line(error)}). Save it there "
                "with tokenizer.save_pretrained, so that there is a tokenizer.json."
            ) from error
        return cls(network, tokenizer)

    def save_reader(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Token ids and mask, int64 (batch, length), to logits (batch, classes)."""
        return self.logits(input_ids=input_ids, attention_mask=attention_mask)


def declared_padding(config: Any) -> int | None:
    """The id of padding by a network's config; None where it has none."""
    padding = getattr(config, "pad_token_id", None)
    return padding if isinstance(padding, int) and padding >= 0 else None
