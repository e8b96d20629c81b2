"""What a classifier of any kind owes training, export and distillation."""

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

# transformers imports torchao wherever it is installed, and torchao complains of GPU kernels that
# no CPU build can load; both say it to everybody, also to those who quantize nothing.
logging.getLogger("torchao").setLevel(logging.ERROR)
logging.getLogger("torch.utils._pytree").addFilter(
    lambda record: "register_constant" not in record.getMessage()
)


class Classifier(nn.Module, ABC):
    """A classifier of the transformers library with what reads its rows.

    A subclass's `forward` takes one tensor for each of its preprocessor's inputs, in their order.

    Args:
        network: A transformers model with a classification head.
        preprocessor: Raw rows to the network's inputs.

    Attributes:
        auto: transformers' Auto class that loads such networks.
        pretrained: False where training starts from random weights.
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
        """A network with what reads its rows, from a Hugging Face folder or id.

        Raises:
            OSError: Its files are missing.
            ModelError: They cannot be used here.
        """

    @abstractmethod
    def save_processor(self, folder: Path) -> None:
        """Write a Hugging Face folder's tokenizer or image processor."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the logits."""
        names = self.network.config.id2label
        return tuple(str(names[index]) for index in range(len(names)))

    def augment(self, encoded: Sequence[Any], random: np.random.Generator) -> Sequence[Any]:
        """Encoded rows as one epoch shows them to the network."""
        return encoded

    def logits(self, **inputs: torch.Tensor) -> torch.Tensor:
        """What the network answers to its inputs, (batch, classes)."""
        return cast(torch.Tensor, self.network(**inputs).logits)
