"""Static student: a classifier on the sum of token and n-gram embeddings, without attention.

    ids ─► pieces[id] + grams[hash(id, next id)] ─► sum ─► layer norm ─► hidden layer ─► logits

About 100 times cheaper than a transformer, with the same token ids and folder format. Importing
this module registers it with transformers' Auto classes. Follows fastText (Joulin et al. 2017),
with hashed n-grams of word pieces instead of words, trained on soft labels of a teacher.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from mlflow_pt_deploy.errors import ModelError
from mlflow_pt_deploy.models.text import TextClassifier
from mlflow_pt_deploy.system import interrupt

PRIMES = (1_000_003, 7_368_787, 39_916_801)
"""Multiplier of the id at each position of an n-gram; ids below 2^20 do not overflow int64."""

FREQUENT = 60_000  # pieces; large vocabularies are sorted by frequency
_BATCH_ROWS = 512


class StaticConfig(PreTrainedConfig):
    """Config of a static classifier.

    Args:
        vocab_size: Number of word pieces.
        hidden_size: Width of the embeddings.
        intermediate_size: Width of the hidden layer.
        buckets: Number of rows of the n-gram table.
        ngrams: Maximum n-gram length, 1 (single pieces) to 3.
        dropout: Dropout before and after the hidden layer.
    """

    model_type = "pt_deploy_static"

    def __init__(
        self,
        vocab_size: int = 30522,
        hidden_size: int = 384,
        intermediate_size: int = 512,
        buckets: int = 32768,
        ngrams: int = 2,
        dropout: float = 0.2,
        **rest: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.buckets = buckets
        self.ngrams = ngrams
        self.dropout = dropout
        super().__init__(**rest)


class StaticForSequenceClassification(PreTrainedModel):
    """Classifier on the sum of piece and n-gram embeddings of a text."""

    config_class = StaticConfig
    base_model_prefix = "static"

    def __init__(self, config: StaticConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.pieces = nn.Embedding(config.vocab_size, width, sparse=True)
        self.grams = nn.Embedding(config.buckets, width, sparse=True)
        self.norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, config.intermediate_size)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.intermediate_size, cast(int, config.num_labels))
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **rest: Any
    ) -> SequenceClassifierOutput:
        """Ids and mask, int64 (batch, length), to logits (batch, classes)."""
        mask = attention_mask.to(self.pieces.weight.dtype).unsqueeze(-1)
        total = (self.pieces(input_ids) * mask).sum(1)
        for size in range(2, self.config.ngrams + 1):
            bucket = self._bucket(input_ids, size)
            total = total + (self.grams(bucket) * mask[:, size - 1 :]).sum(1)
        hidden = torch.relu(self.hidden(self.dropout(self.norm(total))))
        return SequenceClassifierOutput(logits=self.classifier(self.dropout(hidden)))

    def get_input_embeddings(self) -> nn.Module:
        """The table of single pieces."""
        return self.pieces

    def _bucket(self, ids: torch.Tensor, size: int) -> torch.Tensor:
        """Row of the n-gram table per position, int64 (batch, length - size + 1)."""
        end = ids.shape[1] - size + 1
        code = ids[:, :end] * PRIMES[0]
        for place in range(1, size):
            code = code + ids[:, place : end + place] * PRIMES[place]
        return cast(torch.Tensor, code % self.config.buckets)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            # Zero: n-grams that do not occur in training have no effect.
            nn.init.zeros_(module.weight)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


AutoConfig.register(StaticConfig.model_type, StaticConfig)
AutoModelForSequenceClassification.register(StaticConfig, StaticForSequenceClassification)


def new_static(
    teacher: TextClassifier,
    rows: Sequence[str] = (),
    *,
    hidden: int = 512,
    buckets: int = 32768,
    ngrams: int = 2,
    frequent: int = FREQUENT,
) -> TextClassifier:
    """Create a static student initialized from the teacher's last hidden state of each piece.

    The last hidden state contains more task information than the input embedding; Model2Vec
    (Tulkens & van Dongen 2024) uses the same initialization. Pieces that are neither in `rows` nor
    frequent are initialized with zeros, like n-grams.

    Args:
        teacher: The fine-tuned teacher; not changed.
        rows: Texts of train.
        hidden: Width of the hidden layer.
        buckets: Number of rows of the n-gram table.
        ngrams: Maximum n-gram length, 1 to 3.
        frequent: Number of pieces at the start of the vocabulary that count as frequent.

    Raises:
        ModelError: `ngrams` is out of range, or the teacher is a static student.
    """
    if isinstance(teacher.network, StaticForSequenceClassification):
        raise ModelError("the teacher is a static student itself. Use the original teacher.")
    if not 1 <= ngrams <= len(PRIMES):
        raise ModelError(f"ngrams {ngrams}: choose from 1 to {len(PRIMES)}.")
    embedding = _initial_pieces(teacher, rows, frequent)
    config = StaticConfig(
        vocab_size=embedding.shape[0],
        hidden_size=embedding.shape[1],
        intermediate_size=hidden,
        buckets=buckets,
        ngrams=ngrams,
        id2label=dict(enumerate(teacher.labels)),
        label2id={name: index for index, name in enumerate(teacher.labels)},
        pad_token_id=getattr(teacher.network.config, "pad_token_id", 0),
    )
    network = StaticForSequenceClassification(config)
    with torch.no_grad():
        network.pieces.weight.copy_(embedding)
    tokenizer = copy.copy(teacher.tokenizer)
    tokenizer.padding_side = "right"  # required by the n-grams
    return TextClassifier(network, tokenizer).eval()


def _initial_pieces(teacher: TextClassifier, rows: Sequence[str], frequent: int) -> torch.Tensor:
    """Initial piece embeddings, float (pieces, width), with the spread of the teacher's."""
    table: torch.Tensor = teacher.network.get_input_embeddings().weight.detach()
    used = {piece for ids in teacher.preprocessor.encode(rows) for piece in ids}
    ids = torch.tensor(sorted(used.union(range(min(frequent, len(table))))), device=table.device)
    states = _last_states(teacher, ids)
    states = states - states.mean(dim=0)
    start: torch.Tensor = table.new_zeros(len(table), states.shape[1])
    start[ids] = states * (table.std() / states.std().clamp(min=1e-12))
    return start


@torch.no_grad()
def _last_states(teacher: TextClassifier, ids: torch.Tensor) -> torch.Tensor:
    """The teacher's last hidden state of each piece between its special tokens, (ids, width)."""
    empty, filled = teacher.preprocessor.encode(["", "a"])
    position = sum(1 for one, other in zip(empty, filled, strict=False) if one == other)
    position = min(position, len(empty) - 1) if empty else 0
    body = teacher.network.base_model.eval()
    if teacher.network.config.is_encoder_decoder:  # the decoder needs other inputs
        body = body.get_encoder()
    found: list[torch.Tensor] = []
    for some in ids.split(_BATCH_ROWS):
        interrupt.check()
        around = torch.tensor(empty, dtype=some.dtype, device=some.device).repeat(len(some), 1)
        inputs = torch.cat([around[:, :position], some.unsqueeze(1), around[:, position:]], dim=1)
        states = body(input_ids=inputs, attention_mask=torch.ones_like(inputs)).last_hidden_state
        found.append(states[:, position])
    return torch.cat(found)
