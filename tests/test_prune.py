"""What is pruned is gone, what is kept answers as before, and plain transformers loads it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordPiece
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import BertProcessing, Sequence, TemplateProcessing
from torch import nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from mlflow_pt_deploy.data import Splits
from mlflow_pt_deploy.errors import DataError, ModelError
from mlflow_pt_deploy.models import TextClassifier, load_classifier, save_classifier
from mlflow_pt_deploy.pruning import (
    Importance,
    frequent_pieces,
    prune_neurons,
    prune_vocabulary,
    taylor_importance,
    teacher_importance,
)
from mlflow_pt_deploy.training.distillation import distillation_loss, start_student
from mlflow_pt_deploy.training.trainer import Schedule, evaluate, fit, predict_logits

TEXTS = ("My card!", "refund 🙂 it", "wire שלום", "")
ROWS = ("my card", "please refund it today", "wire", "send money abroad to the new payee, please")
TARGETS = np.array([0, 1, 2, 0])  # the last one is wrong, so that its loss is large
DEAD = (range(40), range(24, 64))  # 40 of 64 neurons in each of the two layers
KINDS = ("bert", "camembert", "distilbert", "electra", "mpnet", "roberta", "xlm-roberta")
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]"}


@pytest.fixture
def classifier(tiny_model: Path) -> TextClassifier:
    return load_classifier(str(tiny_model))


def _network(kind: str, **changes: object) -> nn.Module:
    """A random network: 2 layers, 32 wide, 4 heads, 64 neurons; `tiny_model`'s ids fit."""
    changes["hidden_dim" if kind == "distilbert" else "intermediate_size"] = 64
    changes |= {"vocab_size": 188, "max_position_embeddings": 100, "hidden_size": 32}
    changes |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(kind, **{"pad_token_id": 0} | changes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_config(config).eval()


def _reloaded(classifier: TextClassifier, folder: Path) -> TextClassifier:
    save_classifier(classifier, folder)
    network, info = AutoModelForSequenceClassification.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info.values())
    return TextClassifier(network, AutoTokenizer.from_pretrained(folder)).eval()


def _pieces(classifier: TextClassifier, text: str) -> list[str]:
    """The pieces of a text, without the special tokens around it."""
    (ids,) = classifier.preprocessor.encode([text])
    return classifier.tokenizer.convert_ids_to_tokens(ids)[1:-1]


def _weights(classifier: TextClassifier) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in classifier.state_dict().items()}


def _is_unchanged(classifier: TextClassifier, before: dict[str, torch.Tensor]) -> bool:
    after = classifier.state_dict()
    return after.keys() == before.keys() and all(map(torch.equal, after.values(), before.values()))


@pytest.mark.parametrize("kind", KINDS)
def test_neurons_that_add_nothing_go_first_and_change_no_logit(
    kind: str, classifier: TextClassifier, tmp_path: Path
) -> None:
    wide = TextClassifier(_network(kind), classifier.tokenizer)
    downs = [it for it in wide.modules() if isinstance(it, nn.Linear) and it.in_features == 64]
    with torch.no_grad():
        for down, dead in zip(downs, DEAD, strict=True):
            down.weight[:, list(dead)] = 0
    importance = taylor_importance(wide, ROWS, TARGETS % 2)
    for scores, dead in zip(importance.neurons, DEAD, strict=True):
        assert np.flatnonzero(scores == 0).tolist() == list(dead)
    assert importance.heads.shape == (2, 4)
    assert (importance.heads > 0).all()

    before = _weights(wide)
    pruned = prune_neurons(wide, 24, importance)
    assert _is_unchanged(wide, before)
    expected = predict_logits(wide, ROWS)
    np.testing.assert_allclose(predict_logits(pruned, ROWS), expected, rtol=0, atol=1e-6)
    sizes = [sum(weight.numel() for weight in it.parameters()) for it in (wide, pruned)]
    assert sizes[0] - sizes[1] == 2 * 40 * (32 + 1 + 32)  # weights in, bias, weights out
    again = _reloaded(pruned, tmp_path / "pruned")
    assert (predict_logits(again, ROWS) == predict_logits(pruned, ROWS)).all()


def test_the_most_important_neurons_stay_in_their_order(classifier: TextClassifier) -> None:
    scores = np.zeros((2, 64))
    scores[0, [9, 3, 50]] = [1, 2, 3]
    scores[1, [0, 62, 63]] = [2, 1, 3]
    pruned = prune_neurons(classifier, 2, Importance(np.ones((2, 4)), scores, np.ones(32)))
    kept = ([3, 50], [0, 63])
    layers = classifier.network.bert.encoder.layer, pruned.network.bert.encoder.layer
    for old, new, neurons in zip(*layers, kept, strict=True):
        up, down = old.intermediate.dense, old.output.dense
        assert torch.equal(new.intermediate.dense.weight, up.weight[neurons])
        assert torch.equal(new.intermediate.dense.bias, up.bias[neurons])
        assert torch.equal(new.output.dense.weight, down.weight[:, neurons])
        assert torch.equal(new.output.dense.bias, down.bias)
    assert pruned.network.config.intermediate_size == 2
    assert classifier.network.config.intermediate_size == 64
    assert not pruned.training
    assert all(weight.requires_grad for weight in pruned.parameters())


def test_scores_are_what_the_loss_changes_by(classifier: TextClassifier) -> None:
    """Turning a part's output up and down a little, row by row, gives the same slopes."""
    classifier.double()
    importance = taylor_importance(classifier, ROWS, TARGETS)
    for index, layer in enumerate(classifier.network.bert.encoder.layer):
        head, neuron = layer.attention.output.dense.weight, layer.output.dense.weight
        for part in (0, 3):
            columns = head[:, 8 * part : 8 * part + 8]  # 32 wide, 4 heads
            assert _slope(classifier, columns) == pytest.approx(importance.heads[index, part])
            columns = neuron[:, part : part + 1]
            assert _slope(classifier, columns) == pytest.approx(importance.neurons[index, part])


def _slope(classifier: TextClassifier, columns: torch.Tensor) -> float:
    """Mean over the rows of the loss's absolute central difference by a factor on `columns`."""
    step, kept, losses = 1e-4, columns.detach().clone(), []
    inputs = [torch.from_numpy(it) for it in classifier.preprocessor(ROWS).values()]
    truth = torch.from_numpy(TARGETS)
    with torch.no_grad():
        for factor in (1 + step, 1 - step):
            columns.copy_(kept * factor)
            losses.append(functional.cross_entropy(classifier(*inputs), truth, reduction="none"))
        columns.copy_(kept)
    return ((losses[0] - losses[1]) / (2 * step)).abs().mean().item()


def test_scores_do_not_depend_on_the_batch_and_leave_no_trace(classifier: TextClassifier) -> None:
    before = _weights(classifier)
    classifier.train()
    alone = taylor_importance(classifier, ROWS, TARGETS, batch_size=1)
    together = taylor_importance(classifier, ROWS, TARGETS, batch_size=3)
    np.testing.assert_allclose(alone.heads, together.heads, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(alone.neurons, together.neurons, rtol=1e-3, atol=1e-6)
    assert classifier.training
    assert _is_unchanged(classifier, before)
    assert all(it.requires_grad and it.grad is None for it in classifier.parameters())
    assert not any(module._forward_pre_hooks for module in classifier.modules())


def test_a_student_takes_the_teachers_best_neurons_and_heals(
    classifier: TextClassifier, tiny_splits: Splits
) -> None:
    found = teacher_importance(classifier, tiny_splits.train, (1,))
    assert found.neurons.shape == (1, 64)
    student = prune_neurons(
        start_student(classifier, 1), 8, teacher_importance(classifier, tiny_splits.train, (0,))
    )
    assert student.network.config.intermediate_size == 8
    logits = predict_logits(classifier, tiny_splits.train.rows)
    loss = distillation_loss(logits, tiny_splits.train.targets)
    fit(student, tiny_splits, loss, Schedule(epochs=3, learning_rate=0.01))
    assert evaluate(student, tiny_splits.validation) > 0.8


@pytest.mark.parametrize("keep", [-1, 0, 65])
def test_a_number_of_neurons_that_there_is_not(classifier: TextClassifier, keep: int) -> None:
    importance = Importance(np.ones((2, 4)), np.ones((2, 64)), np.ones(32))
    with pytest.raises(ModelError, match=rf"^keep {keep}: choose from 1 to 64, the neurons"):
        prune_neurons(classifier, keep, importance)


def test_scores_of_another_classifier(classifier: TextClassifier) -> None:
    importance = Importance(np.ones((3, 4)), np.ones((3, 64)), np.ones(32))
    with pytest.raises(ModelError, match=r"shape \(3, 64\), the classifier has \(2, 64\)"):
        prune_neurons(classifier, 8, importance)


@pytest.mark.parametrize("rows", [(), ROWS[:3]])
def test_rows_without_their_labels(classifier: TextClassifier, rows: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match=rf"^{len(rows)} rows with 4 labels"):
        taylor_importance(classifier, rows, TARGETS)


def test_an_architecture_that_is_not_supported(classifier: TextClassifier) -> None:
    other = TextClassifier(_network("albert"), classifier.tokenizer)
    importance = Importance(np.ones((2, 4)), np.ones((2, 64)), np.ones(32))
    for prune in (
        lambda: prune_vocabulary(other, TEXTS),
        lambda: prune_neurons(other, 8, importance),
        lambda: taylor_importance(other, ROWS, TARGETS),
    ):
        with pytest.raises(ModelError, match=r"^albert cannot be pruned; supported are bert, .*mp"):
            prune()


def test_a_pruned_vocabulary_changes_nothing_for_its_texts(
    classifier: TextClassifier, tmp_path: Path
) -> None:
    before = _weights(classifier)
    pruned = prune_vocabulary(classifier, TEXTS)
    assert _is_unchanged(classifier, before)
    assert (predict_logits(pruned, TEXTS) == predict_logits(classifier, TEXTS)).all()
    for text in TEXTS:
        assert _pieces(pruned, text) == _pieces(classifier, text)
    again = _reloaded(pruned, tmp_path / "pruned")
    assert (predict_logits(again, TEXTS) == predict_logits(pruned, TEXTS)).all()
    assert again.preprocessor.encode(TEXTS) == pruned.preprocessor.encode(TEXTS)
    assert again.preprocessor.max_length == 128
    assert pruned.tokenizer.name_or_path == classifier.tokenizer.name_or_path


def test_what_a_pruned_vocabulary_holds(classifier: TextClassifier) -> None:
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


def test_unseen_words_are_spelled(classifier: TextClassifier) -> None:
    pruned = prune_vocabulary(classifier, TEXTS)
    assert _pieces(classifier, "transfer") == ["transfer"]
    assert _pieces(pruned, "transfer") == ["t", *(f"##{letter}" for letter in "ransfer")]
    assert _pieces(pruned, "תודה!") == ["ת", "##ו", "##ד", "##ה", "!"]
    assert _pieces(pruned, "🚀 ж") == ["[UNK]", "[UNK]"] == _pieces(classifier, "🚀 ж")


def test_frequent_pieces_come_first_in_a_vocabulary(classifier: TextClassifier) -> None:
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


def test_words_and_pieces_to_keep(classifier: TextClassifier) -> None:
    pruned = prune_vocabulary(classifier, TEXTS, keep=["Transfer", "payees"])
    assert _pieces(pruned, "transfer payees") == ["transfer", "payee", "##s"]
    assert _pieces(pruned, "send")[0] == "s"
    pruned = prune_vocabulary(_small("[PAD] [UNK] [CLS] [SEP] a ##cd ##ef"), ["a"], keep=["##cd"])
    assert pruned.tokenizer.get_vocab() == {
        piece: index for index, piece in enumerate("[PAD] [UNK] [CLS] [SEP] a ##cd".split())
    }


def test_all_rows_of_real_data(classifier: TextClassifier, tiny_splits: Splits) -> None:
    rows = tiny_splits.train.rows
    pruned = prune_vocabulary(classifier, rows[:10])
    known = {piece for row in rows[:10] for piece in _pieces(classifier, row)}
    for row in rows:
        same = _pieces(pruned, row) == _pieces(classifier, row)
        assert same == all(piece in known or len(piece) == 1 for piece in _pieces(classifier, row))


def _small(pieces: str, kind: str = "bert", **changes: object) -> TextClassifier:
    """A random network with a vocabulary of its own: a piece's place is its id."""
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
    return TextClassifier(_network(kind, **changes), tokenizer)


def test_an_unknown_word_stays_unknown(tmp_path: Path) -> None:
    """`abcd` is given up behind `abc`; if `abc` went, `ab ##cd` would be found instead."""
    classifier = _small("[PAD] x [UNK] y [CLS] xy [SEP] abc ab ##cd a ##b ##c")
    classifier.tokenizer.backend_tokenizer.enable_truncation(4)  # the classifier has its own, 100
    pruned = prune_vocabulary(classifier, ["ab ab acd abcd"])
    assert pruned.tokenizer.get_vocab().keys() == classifier.tokenizer.get_vocab().keys() - {"xy"}
    assert _pieces(pruned, "ab acd abcd") == ["ab", "a", "##cd", "[UNK]"]
    again = _reloaded(pruned, tmp_path / "pruned")  # [SEP] has moved from 6 to 5
    assert again.preprocessor.encode(["ab abcd"]) == [[4, 7, 2, 5]]


def test_tokens_added_behind_the_vocabulary(tmp_path: Path) -> None:
    classifier = _small("[PAD] [UNK] unused [CLS] [SEP] a b")
    tokenizer = classifier.tokenizer
    tokenizer.backend_tokenizer.post_processor = BertProcessing(("[SEP]", 4), ("[CLS]", 3))
    tokenizer.add_tokens(["<order>", "<price>"])  # 7 and 8
    classifier = TextClassifier(classifier.network, tokenizer)
    assert classifier.preprocessor.encode(["a<price>b"]) == [[3, 5, 8, 6, 4]]
    pruned = prune_vocabulary(classifier, ["b"])
    again = _reloaded(pruned, tmp_path / "pruned")
    for it in (pruned, again):
        assert it.preprocessor.encode(["a<price>b"]) == [[2, 4, 7, 5, 3]]
    expected = predict_logits(classifier, ["a<price>b"])
    assert (predict_logits(again, ["a<price>b"]) == expected).all()


def test_ids_in_the_config_move_too() -> None:
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


def test_ids_that_mean_more_than_an_embedding() -> None:
    """RoBERTa counts positions from the padding's id, which is 5 here and would become 3."""
    pieces = "unused also [UNK] [CLS] [SEP] [PAD] a"
    classifier = _small(pieces, "roberta", pad_token_id=5, bos_token_id=3, eos_token_id=4)
    with pytest.raises(
        ModelError,
        match=r"^Renumbered token ids change the logits: this roberta uses them for more",
    ):
        prune_vocabulary(classifier, ["a"])


def test_ids_in_a_place_that_is_not_known() -> None:
    classifier = _small("[PAD] [UNK] unused [CLS] [SEP] a")
    backend = classifier.tokenizer.backend_tokenizer
    backend.post_processor = Sequence([backend.post_processor])
    with pytest.raises(ModelError, match=r"^'a a' would be tokenized differently: its tokenizer"):
        prune_vocabulary(classifier, ["a a"])


def test_a_tokenizer_of_another_kind(classifier: TextClassifier) -> None:
    backend = Tokenizer(BPE({"[PAD]": 0, "[UNK]": 1, "a": 2}, [], unk_token="[UNK]"))
    other = PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)
    with pytest.raises(
        ModelError, match=r"^A BPE tokenizer's vocabulary .* supported is WordPiece"
    ):
        prune_vocabulary(TextClassifier(classifier.network, other), TEXTS)


def test_no_texts_or_too_few_embeddings(classifier: TextClassifier) -> None:
    with pytest.raises(DataError, match="^texts is empty"):
        prune_vocabulary(classifier, [])
    classifier.tokenizer.add_tokens(["<order>"])
    rows = len(classifier.network.get_input_embeddings().weight)
    with pytest.raises(ModelError, match=rf"has the id {rows}, the model {rows} embeddings"):
        prune_vocabulary(classifier, TEXTS)
