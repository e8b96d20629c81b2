"""Interface of classifiers for training, distillation and export."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import nn

from mlflow_pt_deploy.preprocessing import Preprocessor

# transformers imports torchao if it is installed. On CPU builds both log warnings about GPU kernels
# that are irrelevant here.
logging.getLogger("torchao").setLevel(logging.ERROR)
logging.getLogger("torch.utils._pytree").addFilter(
    lambda record: "register_constant" not in record.getMessage()
)


class Classifier(nn.Module, ABC):
    """A transformers classifier with its preprocessor.

    `forward` takes one tensor per input of the preprocessor, in the same order.

    Args:
        network: A transformers model with a classification head.
        preprocessor: Converts raw rows to the inputs of the network.

    Attributes:
        auto: The transformers Auto class that loads the network.
        pretrained: False if training starts from random weights.
    """

    auto: ClassVar[Any]
    pretrained: bool = True

    def __init__(self, network: Any, preprocessor: Preprocessor) -> None:
        super().__init__()
        self.network = network
        self.preprocessor = preprocessor

    @classmethod
    @abstractmethod
    def with_processor(cls, network: Any, folder: str) -> Classifier:
        """Combine a network with the tokenizer or image processor of a Hugging Face folder.

        Raises:
            OSError: Files are missing.
            ModelError: The tokenizer or image processor is not supported.
        """

    @abstractmethod
    def save_processor(self, folder: Path) -> None:
        """Write the tokenizer or image processor in Hugging Face format."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the logits."""
        names = self.network.config.id2label
        return tuple(str(names[index]) for index in range(len(names)))

    def augment(self, encoded: Sequence[Any], random: np.random.Generator) -> Sequence[Any]:
        """Augment encoded rows for one epoch of training."""
        return encoded

    def logits(self, **inputs: torch.Tensor) -> torch.Tensor:
        """Logits of the network, (batch, classes)."""
        return cast(torch.Tensor, self.network(**inputs).logits)
