"""Vocabulary pruning: remove the word pieces that the training texts do not need.

Embeddings are most of a small model's size.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from mlflow_pt_deploy.errors import DataError, ModelError
from mlflow_pt_deploy.models import TextClassifier
from mlflow_pt_deploy.models.architectures import family_of
from mlflow_pt_deploy.models.custom_head_size import blank_network
from mlflow_pt_deploy.training.inference import predict_logits


def prune_vocabulary(
    classifier: TextClassifier, texts: Sequence[str], *, keep: Sequence[str] = ()
) -> TextClassifier:
    """Keep only the word pieces that `texts` need, and all single characters.

    Follows "Load What You Need" (Abdaoui, Pradel & Sigel 2020). Each of `texts` is tokenized into
    the same pieces as before and gets the same logits. Other texts may lose accuracy: a word whose
    pieces were dropped is split into shorter ones, down to single characters. It becomes unknown
    only if one of its characters is not in the vocabulary.

    Args:
        classifier: A classifier with a WordPiece tokenizer; it is not changed.
        texts: Rows whose tokenization must not change, usually all of train.
        keep: Further words (with all their pieces) or single pieces to keep.

    Returns:
        A classifier with renumbered token ids and the matching tokenizer.

    Raises:
        DataError: `texts` is empty.
        ModelError: The architecture or the tokenizer is not supported, or the final check finds a
            text with other tokens or other logits.
    """
    family_of(classifier.network.config)
    if not texts:
        raise DataError("texts is empty. Give the rows whose word pieces must be kept.")
    rows = [*texts, *keep]
    specification = json.loads(classifier.tokenizer.backend_tokenizer.to_str())
    old_ids = _required_ids(classifier, specification, rows, keep)
    new_ids = {old: new for new, old in enumerate(old_ids)}
    network = _slice_embeddings(classifier.network, old_ids, new_ids)
    pruned = TextClassifier(network, _rewrite(classifier.tokenizer, specification, new_ids)).eval()
    _verify(classifier, pruned, rows, new_ids)
    return pruned


def frequent_pieces(classifier: TextClassifier, count: int = 8000) -> list[str]:
    """Return the most frequent pieces of the vocabulary, for `prune_vocabulary`'s `keep`.

    Texts outside of train are likely to need them. BERT's vocabularies are sorted by frequency,
    after punctuation and characters.

    Args:
        classifier: A classifier with a WordPiece tokenizer.
        count: Number of pieces, without special and unused ones.
    """
    pieces = sorted(classifier.tokenizer.get_vocab().items(), key=lambda item: item[1])
    regular = [piece for piece, _ in pieces if not (piece[0] == "[" and piece[-1] == "]")]
    return regular[:count]


def _required_ids(
    classifier: TextClassifier, specification: Any, rows: Sequence[str], keep: Sequence[str]
) -> list[int]:
    """Token ids to keep, ascending; `specification` is the parsed tokenizer.json."""
    model, added = specification["model"], specification["added_tokens"]
    if model["type"] != "WordPiece":
        raise ModelError(
            f"the vocabulary of a {model['type']} tokenizer cannot be pruned. Supported: WordPiece."
        )
    vocabulary, prefix = model["vocab"], model["continuing_subword_prefix"]
    unknown = vocabulary[model["unk_token"]]
    encoded = classifier.preprocessor.encode(rows)
    needed = {unknown, *(token["id"] for token in added)}.union(*encoded)
    needed |= {vocabulary[piece] for piece in keep if piece in vocabulary}
    needed |= {index for piece, index in vocabulary.items() if len(piece.removeprefix(prefix)) == 1}
    needed |= set(_config_ids(classifier.network.config).values()) & set(vocabulary.values())
    backend = copy.deepcopy(classifier.tokenizer.backend_tokenizer)
    backend.no_truncation()  # its limit may be lower than the classifier's
    for row, ids in zip(rows, encoded, strict=True):
        if unknown in ids:
            needed.update(_abandoned_prefixes(backend, row, unknown))
    return sorted(needed)


def _abandoned_prefixes(backend: Any, row: str, unknown: int) -> Iterator[int]:
    """Yield pieces that WordPiece's greedy search matched in words that ended as unknown.

    Without them the search would match shorter pieces, and an unknown word could become known.
    """
    encoding = backend.encode(row.encode("utf8", "replace").decode("utf8"))
    tokens = zip(encoding.offsets, encoding.ids, strict=True)
    for raw in (row[start:end] for (start, end), index in tokens if index == unknown):
        word = backend.normalizer.normalize_str(raw) if backend.normalizer else raw
        for length in range(len(word) - 1, 0, -1):
            pieces = [piece.id for piece in backend.model.tokenize(word[:length])]
            if unknown not in pieces:
                yield from pieces
                break


def _slice_embeddings(network: Any, old_ids: list[int], new_ids: dict[int, int]) -> Any:
    """Build the network with only the embeddings of `old_ids`."""
    table = network.get_input_embeddings().weight
    if max(old_ids) >= len(table):
        raise ModelError(
            f"the tokenizer has the id {max(old_ids)}, but the model has {len(table)} embeddings. "
            "Call network.resize_token_embeddings(len(tokenizer)) and train it first."
        )
    config = copy.deepcopy(network.config)
    config.vocab_size = len(old_ids)
    for name, index in _config_ids(config).items():
        setattr(config, name, new_ids.get(index))
    (name,) = (name for name, weight in network.named_parameters() if weight is table)
    sliced = blank_network(TextClassifier.auto, config).to(table)
    sliced.load_state_dict(network.state_dict() | {name: table[old_ids]})
    return sliced


def _config_ids(config: Any) -> dict[str, int]:
    """Names and values of ``pad_token_id`` and similar entries."""
    names = config.to_dict().items()
    return {name: it for name, it in names if name.endswith("_token_id") and isinstance(it, int)}


def _rewrite(tokenizer: Any, specification: Any, new_ids: dict[int, int]) -> Any:
    """Reload the tokenizer with only the pieces of `new_ids`."""
    pieces = specification["model"]["vocab"].items()
    specification["model"]["vocab"] = {name: new_ids[old] for name, old in pieces if old in new_ids}
    for token in specification["added_tokens"]:
        token["id"] = new_ids[token["id"]]
    template = specification["post_processor"] or {}
    for token in template.get("special_tokens", {}).values():  # TemplateProcessing
        token["ids"] = [new_ids[old] for old in token["ids"]]
    for name in {"cls", "sep"} & template.keys():  # BertProcessing
        template[name][1] = new_ids[template[name][1]]
    if padding := specification["padding"]:
        padding["pad_id"] = new_ids.get(padding["pad_id"], 0)
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        Path(folder, "tokenizer.json").write_text(json.dumps(specification), encoding="utf8")
        rewritten = AutoTokenizer.from_pretrained(folder)
    rewritten.name_or_path = tokenizer.name_or_path
    return rewritten


def _verify(
    old: TextClassifier, new: TextClassifier, rows: Sequence[str], new_ids: dict[int, int]
) -> None:
    """Check that all rows have the same pieces, and the first 32 rows the same logits."""
    before, after = old.preprocessor.encode(rows), new.preprocessor.encode(rows)
    for row, expected, ids in zip(rows, before, after, strict=True):
        if [new_ids[index] for index in expected] != ids:
            raise ModelError(
                f"{row!r} would be tokenized differently: tokenizer.json has ids in unsupported "
                "entries. Keep the whole vocabulary."
            )
    probe, device = rows[:32], str(old.network.device)
    first, second = (predict_logits(it, probe, device=device) for it in (old, new))
    if not np.allclose(first, second, rtol=0, atol=1e-5):
        raise ModelError(
            f"renumbered token ids change the logits: this {old.network.config.model_type} uses "
            "token ids outside of its embeddings. Keep the whole vocabulary."
        )
