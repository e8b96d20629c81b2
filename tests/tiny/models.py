"""Small random classifiers of many architectures, with tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "is it gonna rain in zürich on the 24th",
    "will naïve café goers enjoy 東京's sun",
    "play some jazz",
    "book a table for two, or for three",
    "add this song to my playlist",
] * 20
LABELS = {0: "bad", 1: "good", 2: "so-so"}
HEAD = {"id2label": LABELS, "label2id": {name: index for index, name in LABELS.items()}}
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "initializer_range": 0.3,
}
ROBERTA = {
    "max_position_embeddings": 34,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "type_vocab_size": 1,
}


def words() -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer like BERT's; [PAD] has the id 0."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend.train_from_iterator(
        TEXTS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=special)
    )
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return _fast(backend, **dict(zip(names, special, strict=True)))


def pieces(**options: Any) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer like RoBERTa's with <s> and </s>; <pad> has the id 1."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    backend = _bytes(special)
    backend.post_processor = processors.BertProcessing(("</s>", 2), ("<s>", 0))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return _fast(backend, **{**names, **options})


def plain(pad: str | None) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer like GPT-2's without special tokens around a text."""
    tokenizer = _fast(_bytes(["!"]))
    tokenizer.add_special_tokens({"eos_token": "<|end|>", **({"pad_token": pad} if pad else {})})
    return tokenizer


def network(architecture: str, tokenizer: Any, **config: Any) -> Any:
    """A random network, e.g. of `BertForSequenceClassification`."""
    kind = getattr(transformers, architecture)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(kind.config_class(vocab_size=len(tokenizer), **{**HEAD, **config})).eval()


def save(folder: Path, architecture: str, tokenizer: Any, **config: Any) -> str:
    """Save a `network` and its tokenizer; return the folder."""
    network(architecture, tokenizer, **config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _bytes(special: list[str]) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    return backend


def _fast(backend: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{"model_max_length": 32, **options})
