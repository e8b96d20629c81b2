"""Vocabulary pruning: smaller embeddings and tokenizer, the same logits for the given texts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny.pruning import is_unchanged, random_network, reloaded, weights
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordPiece
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import BertProcessing, Sequence, TemplateProcessing
from transformers import PreTrainedTokenizerFast

from mlflow_pt_deploy.data import Splits
from mlflow_pt_deploy.errors import DataError, ModelError
from mlflow_pt_deploy.models import TextClassifier, load_classifier
from mlflow_pt_deploy.pruning import frequent_pieces, prune_vocabulary
from mlflow_pt_deploy.training.inference import predict_logits

TEXTS = ("My card!", "refund 🙂 it", "wire שלום", "")
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]"}


@pytest.fixture
def classifier(tiny_model: Path) -> TextClassifier:
    return load_classifier(str(tiny_model))


def _pieces(classifier: TextClassifier, text: str) -> list[str]:
    """Return the pieces of a text without special tokens."""
    (ids,) = classifier.preprocessor.encode([text])
    return classifier.tokenizer.convert_ids_to_tokens(ids)[1:-1]


def test_given_texts_keep_their_tokens_and_logits(
    classifier: TextClassifier, tmp_path: Path
) -> None:
    before = weights(classifier)
    pruned = prune_vocabulary(classifier, TEXTS)
    assert is_unchanged(classifier, before)
    assert (predict_logits(pruned, TEXTS) == predict_logits(classifier, TEXTS)).all()
    for text in TEXTS:
        assert _pieces(pruned, text) == _pieces(classifier, text)
    again = reloaded(pruned, tmp_path / "pruned")
    assert (predict_logits(again, TEXTS) == predict_logits(pruned, TEXTS)).all()
    assert again.preprocessor.encode(TEXTS) == pruned.preprocessor.encode(TEXTS)
    assert again.preprocessor.max_length == 128
    assert pruned.tokenizer.name_or_path == classifier.tokenizer.name_or_path


def test_contents_of_a_pruned_vocabulary(classifier: TextClassifier) -> None:
    old, new = classifier.tokenizer.get_vocab(), prune_vocabulary(classifier, TEXTS)
    pieces = new.tokenizer.get_vocab()
    special = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}
    spelling = {piece for piece in old if len(piece.removeprefix("##")) == 1}
    assert pieces.keys() == special | {"card", "my", "refund", "it", "wire"} | spelling
    assert sorted(pieces.values()) == list(range(len(pieces)))
    table = new.network.get_input_embeddings()
    assert table.weight.shape == (len(pieces), 32)
    assert new.network.config.vocab_size == table.num_embeddings == len(pieces)
    assert table.weight.requires_grad
    for piece, index in pieces.items():
        row = classifier.network.get_input_embeddings().weight[old[piece]]
        assert torch.equal(table.weight[index], row)
    assert classifier.network.config.vocab_size == len(old)


def test_unseen_words_are_split_into_shorter_pieces(classifier: TextClassifier) -> None:
    pruned = prune_vocabulary(classifier, TEXTS)
    assert _pieces(classifier, "transfer") == ["transfer"]
    assert _pieces(pruned, "transfer") == ["t", *(f"##{letter}" for letter in "ransfer")]
    assert _pieces(pruned, "תודה!") == ["ת", "##ו", "##ד", "##ה", "!"]
    assert _pieces(pruned, "🚀 ж") == ["[UNK]", "[UNK]"] == _pieces(classifier, "🚀 ж")


def test_frequent_pieces_are_the_first_of_the_vocabulary(classifier: TextClassifier) -> None:
    few = frequent_pieces(classifier, 3)
    assert (
        few
        == sorted(
            (piece for piece in classifier.tokenizer.get_vocab() if piece[0] != "["),
            key=classifier.tokenizer.convert_tokens_to_ids,
        )[:3]
    )
    pruned = prune_vocabulary(classifier, ["my card"], keep=few)
    assert set(few) <= set(pruned.tokenizer.get_vocab())


def test_extra_words_and_pieces_are_kept(classifier: TextClassifier) -> None:
    pruned = prune_vocabulary(classifier, TEXTS, keep=["Transfer", "payees"])
    assert _pieces(pruned, "transfer payees") == ["transfer", "payee", "##s"]
    assert _pieces(pruned, "send")[0] == "s"
    pruned = prune_vocabulary(_small("[PAD] [UNK] [CLS] [SEP] a ##cd ##ef"), ["a"], keep=["##cd"])
    assert pruned.tokenizer.get_vocab() == {
        piece: index for index, piece in enumerate("[PAD] [UNK] [CLS] [SEP] a ##cd".split())
    }


def test_rows_of_known_words_are_unchanged(classifier: TextClassifier, tiny_splits: Splits) -> None:
    rows = tiny_splits.train.rows
    pruned = prune_vocabulary(classifier, rows[:10])
    known = {piece for row in rows[:10] for piece in _pieces(classifier, row)}
    for row in rows:
        same = _pieces(pruned, row) == _pieces(classifier, row)
        assert same == all(piece in known or len(piece) == 1 for piece in _pieces(classifier, row))


def _small(pieces: str, kind: str = "bert", **changes: object) -> TextClassifier:
    """A random network with a given vocabulary; ids follow the order of `pieces`."""
    vocabulary = {piece: index for index, piece in enumerate(pieces.split())}
    backend = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, cls_token="[CLS]", sep_token="[SEP]", **SPECIAL
    )
    return TextClassifier(random_network(kind, **changes), tokenizer)


def test_unknown_words_stay_unknown(tmp_path: Path) -> None:
    """The search of `abcd` ends after `abc`; without `abc` it would find `ab ##cd`."""
    classifier = _small("[PAD] x [UNK] y [CLS] xy [SEP] abc ab ##cd a ##b ##c")
    classifier.tokenizer.backend_tokenizer.enable_truncation(4)  # the classifier has its own, 100
    pruned = prune_vocabulary(classifier, ["ab ab acd abcd"])
    assert pruned.tokenizer.get_vocab().keys() == classifier.tokenizer.get_vocab().keys() - {"xy"}
    assert _pieces(pruned, "ab acd abcd") == ["ab", "a", "##cd", "[UNK]"]
    again = reloaded(pruned, tmp_path / "pruned")  # [SEP] has moved from 6 to 5
    assert again.preprocessor.encode(["ab abcd"]) == [[4, 7, 2, 5]]


def test_added_tokens(tmp_path: Path) -> None:
    classifier = _small("[PAD] [UNK] unused [CLS] [SEP] a b")
    tokenizer = classifier.tokenizer
    tokenizer.backend_tokenizer.post_processor = BertProcessing(("[SEP]", 4), ("[CLS]", 3))
    tokenizer.add_tokens(["<order>", "<price>"])  # 7 and 8
    classifier = TextClassifier(classifier.network, tokenizer)
    assert classifier.preprocessor.encode(["a<price>b"]) == [[3, 5, 8, 6, 4]]
    pruned = prune_vocabulary(classifier, ["b"])
    again = reloaded(pruned, tmp_path / "pruned")
    for it in (pruned, again):
        assert it.preprocessor.encode(["a<price>b"]) == [[2, 4, 7, 5, 3]]
    expected = predict_logits(classifier, ["a<price>b"])
    assert (predict_logits(again, ["a<price>b"]) == expected).all()


def test_ids_in_the_config_are_renumbered() -> None:
    pieces = "unused also [UNK] [CLS] [SEP] [PAD] a"
    classifier = _small(pieces, pad_token_id=5, eos_token_id=4, bos_token_id=1)
    classifier.tokenizer.backend_tokenizer.enable_padding(pad_id=5)
    pruned = prune_vocabulary(classifier, ["a"])
    config = pruned.network.config
    assert (config.pad_token_id, config.eos_token_id, config.bos_token_id) == (4, 3, 0)
    assert pruned.network.get_input_embeddings().padding_idx == 4
    assert pruned.tokenizer.backend_tokenizer.padding["pad_id"] == 4
    assert pruned.preprocessor.pad_id == 4
    assert (predict_logits(pruned, ["a", "a a"]) == predict_logits(classifier, ["a", "a a"])).all()


def test_ids_used_outside_of_the_embeddings() -> None:
    """RoBERTa counts positions from the padding id, which is 5 here and would become 3."""
    pieces = "unused also [UNK] [CLS] [SEP] [PAD] a"
    classifier = _small(pieces, "roberta", pad_token_id=5, bos_token_id=3, eos_token_id=4)
    with pytest.raises(
        ModelError,
        match=r"^renumbered token ids change the logits: this roberta uses token ids outside",
    ):
        prune_vocabulary(classifier, ["a"])


def test_ids_in_an_unsupported_entry() -> None:
    classifier = _small("[PAD] [UNK] unused [CLS] [SEP] a")
    backend = classifier.tokenizer.backend_tokenizer
    backend.post_processor = Sequence([backend.post_processor])
    with pytest.raises(ModelError, match=r"^'a a' would be tokenized differently: tokenizer"):
        prune_vocabulary(classifier, ["a a"])


def test_unsupported_tokenizer(classifier: TextClassifier) -> None:
    backend = Tokenizer(BPE({"[PAD]": 0, "[UNK]": 1, "a": 2}, [], unk_token="[UNK]"))
    other = PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)
    with pytest.raises(
        ModelError, match=r"^the vocabulary of a BPE tokenizer cannot.* Supported: WordPiece"
    ):
        prune_vocabulary(TextClassifier(classifier.network, other), TEXTS)


def test_no_texts_and_too_few_embeddings(classifier: TextClassifier) -> None:
    with pytest.raises(DataError, match="^texts is empty"):
        prune_vocabulary(classifier, [])
    classifier.tokenizer.add_tokens(["<order>"])
    rows = len(classifier.network.get_input_embeddings().weight)
    with pytest.raises(ModelError, match=rf"has the id {rows}, but the model has {rows} emb"):
        prune_vocabulary(classifier, TEXTS)
