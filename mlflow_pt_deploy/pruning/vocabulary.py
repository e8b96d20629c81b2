"""Without the word pieces that train does not need: most of a small model's size."""

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
from mlflow_pt_deploy.training.trainer import predict_logits


def prune_vocabulary(
    classifier: TextClassifier, texts: Sequence[str], *, keep: Sequence[str] = ()
) -> TextClassifier:
    """Keep only the word pieces that `texts` need, and all single characters.

    Follows "Load What You Need" (Abdaoui, Pradel & Sigel 2020). Each of `texts` becomes the same
    pieces as before and gets the same logits. The price is paid by other texts: a word whose pieces
    were dropped is spelled with shorter ones, down to single characters, which the classifier has
    seldom seen. It becomes unknown only where one of its characters is no piece of its own.

    Args:
        classifier: A classifier whose tokenizer is a WordPiece; it is not changed.
        texts: Rows that must stay as they are, usually all of train.
        keep: Further words (each keeps all its pieces) or single pieces that must survive.

    Returns:
        The classifier with renumbered token ids and a tokenizer to match.

    Raises:
        DataError: `texts` is empty.
        ModelError: The architecture or the kind of tokenizer is not supported, or the check at the
            end finds a text that is tokenized or answered differently.
    """
    family_of(classifier.network.config)
    if not texts:
        raise DataError("texts is empty. Give the rows whose word pieces are to be kept.")
    rows = [*texts, *keep]
    specification = json.loads(classifier.tokenizer.backend_tokenizer.to_str())
    old_ids = _needed(classifier, specification, rows, keep)
    new_ids = {old: new for new, old in enumerate(old_ids)}
    network = _slice_embeddings(classifier.network, old_ids, new_ids)
    pruned = TextClassifier(network, _rewrite(classifier.tokenizer, specification, new_ids)).eval()
    _verify(classifier, pruned, rows, new_ids)
    return pruned


def frequent_pieces(classifier: TextClassifier, count: int = 8000) -> list[str]:
    """Pieces that texts outside of train are likely to need, for `prune_vocabulary`'s `keep`.

    BERT's vocabularies are sorted by how often a piece occurred, signs and characters first.

    Args:
        classifier: Its tokenizer is a WordPiece.
        count: How many, special and unused ones left out.
    """
    pieces = sorted(classifier.tokenizer.get_vocab().items(), key=lambda item: item[1])
    named = [piece for piece, _ in pieces if not (piece[0] == "[" and piece[-1] == "]")]
    return named[:count]


def _needed(
    classifier: TextClassifier, specification: Any, rows: Sequence[str], keep: Sequence[str]
) -> list[int]:
    """Ids that must survive, in their new order; `specification` is the parsed tokenizer.json."""
    model, added = specification["model"], specification["added_tokens"]
    if model["type"] != "WordPiece":
        raise ModelError(
            f"A {model['type']} tokenizer's vocabulary cannot be pruned; supported is WordPiece."
        )
    vocabulary, prefix = model["vocab"], model["continuing_subword_prefix"]
    unknown = vocabulary[model["unk_token"]]
    encoded = classifier.preprocessor.encode(rows)
    needed = {unknown, *(token["id"] for token in added)}.union(*encoded)
    needed |= {vocabulary[piece] for piece in keep if piece in vocabulary}
    needed |= {index for piece, index in vocabulary.items() if len(piece.removeprefix(prefix)) == 1}
    needed |= set(_config_ids(classifier.network.config).values()) & set(vocabulary.values())
    backend = copy.deepcopy(classifier.tokenizer.backend_tokenizer)
    backend.no_truncation()  # it may be shorter than the classifier's own
    for row, ids in zip(rows, encoded, strict=True):
        if unknown in ids:
            needed.update(_given_up(backend, row, unknown))
    return sorted(needed)


def _given_up(backend: Any, row: str, unknown: int) -> Iterator[int]:
    """Pieces that WordPiece's greedy search matched in a row's words before it gave them up.

    Without them it would match shorter ones there, and might then get through.
    """
    encoding = backend.encode(row.encode("utf8", "replace").decode("utf8"))
    found = zip(encoding.offsets, encoding.ids, strict=True)
    for raw in (row[start:end] for (start, end), index in found if index == unknown):
        word = backend.normalizer.normalize_str(raw) if backend.normalizer else raw
        for length in range(len(word) - 1, 0, -1):
            pieces = [piece.id for piece in backend.model.tokenize(word[:length])]
            if unknown not in pieces:
                yield from pieces
                break


def _slice_embeddings(network: Any, old_ids: list[int], new_ids: dict[int, int]) -> Any:
    """The network as its own config would build it, with only the embeddings of `old_ids`."""
    table = network.get_input_embeddings().weight
    if max(old_ids) >= len(table):
        raise ModelError(
            f"The tokenizer has the id {max(old_ids)}, the model {len(table)} embeddings. "
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
    """Names and values of ``pad_token_id`` and its like."""
    names = config.to_dict().items()
    return {name: it for name, it in names if name.endswith("_token_id") and isinstance(it, int)}


def _rewrite(tokenizer: Any, specification: Any, new_ids: dict[int, int]) -> Any:
    """The tokenizer with only the pieces of `new_ids`, as it comes back from its folder."""
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
    """Raise unless all rows have the same pieces, and the first of them the same logits."""
    before, after = old.preprocessor.encode(rows), new.preprocessor.encode(rows)
    for row, expected, ids in zip(rows, before, after, strict=True):
        if [new_ids[index] for index in expected] != ids:
            problem = "its tokenizer.json has ids in unknown places. Keep the whole vocabulary."
            raise ModelError(f"{row!r} would be tokenized differently: {problem}")
    probe, device = rows[:32], str(old.network.device)
    first, second = (predict_logits(it, probe, device=device) for it in (old, new))
    if not np.allclose(first, second, rtol=0, atol=1e-5):
        raise ModelError(
            f"Renumbered token ids change the logits: this {old.network.config.model_type} uses "
            "them for more than its embeddings. Keep its whole vocabulary."
        )
