"""Pruning of attention heads and hidden dimensions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny.pruning import ROWS, random_network, reloaded

from mlflow_pt_deploy.data import Splits
from mlflow_pt_deploy.errors import ModelError
from mlflow_pt_deploy.models import (
    TextClassifier,
    blank_classifier,
    load_classifier,
    new_classifier,
    save_classifier,
)
from mlflow_pt_deploy.pruning import (
    Importance,
    cut_student,
    prune_heads,
    prune_vocabulary,
    prune_width,
    taylor_importance,
)
from mlflow_pt_deploy.training.distillation import distillation_loss, start_student
from mlflow_pt_deploy.training.inference import evaluate, predict_logits
from mlflow_pt_deploy.training.optimization import Schedule
from mlflow_pt_deploy.training.trainer import fit

TARGETS = np.array([0, 1, 1, 0])
KINDS = ("bert", "camembert", "distilbert", "electra", "roberta", "xlm-roberta")
ZEROED_HEADS = ((1,), (3,))
DROPPED_WIDTH = tuple(range(5, 13))


@pytest.fixture
def classifier(tiny_model: Path) -> TextClassifier:
    found = load_classifier(str(tiny_model))
    assert isinstance(found, TextClassifier)
    return found


def _random(kind: str, like: TextClassifier) -> TextClassifier:
    return TextClassifier(random_network(kind), like.tokenizer)


def _scores(**zeros: tuple[object, ...]) -> Importance:
    """Scores of 1; those of `zeros` are 0."""
    heads, neurons, width = np.ones((2, 4)), np.ones((2, 64)), np.ones(32)
    for layer, zeroed in enumerate(zeros.get("heads", ())):
        heads[layer, list(zeroed)] = 0  # type: ignore[call-overload]
    width[list(zeros.get("width", ()))] = 0  # type: ignore[arg-type]
    return Importance(heads, neurons, width)


@pytest.mark.parametrize("kind", KINDS)
def test_heads_without_effect_score_0_and_are_pruned_first(
    kind: str, classifier: TextClassifier, tmp_path: Path
) -> None:
    whole = _random(kind, classifier)
    mixed = [
        it
        for name, it in whole.named_modules()
        if name.endswith(("attention.output.dense", "attention.out_lin"))
    ]
    with torch.no_grad():
        for layer, zeroed in zip(mixed, ZEROED_HEADS, strict=True):
            for head in zeroed:
                layer.weight[:, 8 * head : 8 * head + 8] = 0
    importance = taylor_importance(whole, ROWS, TARGETS)
    assert [np.flatnonzero(scores == 0).tolist() for scores in importance.heads] == [[1], [3]]

    pruned = prune_heads(whole, 3, importance)
    expected = predict_logits(whole, ROWS)
    np.testing.assert_allclose(predict_logits(pruned, ROWS), expected, rtol=0, atol=1e-6)
    sizes = [sum(weight.numel() for weight in it.parameters()) for it in (whole, pruned)]
    assert sizes[0] - sizes[1] == 2 * 8 * (3 * (32 + 1) + 32)  # q, k, v with bias, output
    assert whole.network.config.num_attention_heads == 4

    save_classifier(pruned, tmp_path / "pruned")
    again = load_classifier(str(tmp_path / "pruned"))
    assert again.network.config.num_attention_heads == 3
    assert (predict_logits(again, ROWS) == predict_logits(pruned, ROWS)).all()
    blank = blank_classifier(tmp_path / "pruned")
    assert {name: it.shape for name, it in blank.state_dict().items()} == {
        name: it.shape for name, it in again.state_dict().items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_width_pruning_slices_every_tensor_of_the_hidden_size(
    kind: str, classifier: TextClassifier, tmp_path: Path
) -> None:
    whole = _random(kind, classifier)
    pruned = prune_width(whole, 24, _scores(width=DROPPED_WIDTH))
    kept = [place for place in range(32) if place not in DROPPED_WIDTH]
    old, new = whole.state_dict(), pruned.state_dict()
    up = next(name for name in old if name.endswith(("intermediate.dense.weight", "lin1.weight")))
    query = next(name for name in old if name.endswith(("query.weight", "q_lin.weight")))
    for name, shape in ((up, (64, 24)), (query, (32, 24))):
        assert new[name].shape == shape
        assert torch.equal(new[name], old[name][:, kept])
    assert pruned.network.config.hidden_size == 24
    save_classifier(pruned, tmp_path / "pruned")
    again = load_classifier(str(tmp_path / "pruned"))
    assert (predict_logits(again, ROWS) == predict_logits(pruned, ROWS)).all()


def test_plain_transformers_loads_a_standard_head_size(
    classifier: TextClassifier, tmp_path: Path
) -> None:
    """Three heads of 8 in 24 dimensions need no custom head size."""
    slim = prune_width(prune_heads(classifier, 3, _scores()), 24, _scores())
    plain = reloaded(slim, tmp_path / "slim")
    np.testing.assert_allclose(
        predict_logits(plain, ROWS), predict_logits(slim, ROWS), rtol=0, atol=1e-6
    )


def test_pruned_students_can_be_trained_saved_relabeled_and_pruned_again(
    classifier: TextClassifier, tiny_splits: Splits, tmp_path: Path
) -> None:
    student = cut_student(
        start_student(classifier, 1),
        classifier,
        tiny_splits.train,
        (0,),
        heads=3,
        neurons=16,
        width=0.75,
    )
    config = student.network.config
    shape = (config.num_attention_heads, config.intermediate_size, config.hidden_size)
    assert shape == (3, 16, 24)
    loss = distillation_loss(
        predict_logits(classifier, tiny_splits.train.rows), tiny_splits.train.targets
    )
    fit(student, tiny_splits, loss, Schedule(epochs=3, learning_rate=0.01))
    assert evaluate(student, tiny_splits.validation) > 0.8

    odd = prune_heads(student, 1, Importance(np.ones((1, 3)), np.ones((1, 16)), np.ones(24)))
    texts = tiny_splits.train.rows[:8]
    cut = prune_vocabulary(odd, texts)
    assert (predict_logits(cut, texts) == predict_logits(odd, texts)).all()
    save_classifier(odd, tmp_path / "odd")
    other = new_classifier(str(tmp_path / "odd"), ["a", "b", "c", "d", "e", "f", "g"])
    assert len(other.labels) == 7
    kept = "bert.encoder.layer.0.attention.self.query.weight"
    assert torch.equal(other.network.state_dict()[kept], odd.network.state_dict()[kept])


def test_no_pruning_by_default(classifier: TextClassifier, tiny_splits: Splits) -> None:
    assert cut_student(classifier, classifier, tiny_splits.train, (0, 1)) is classifier


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        (
            lambda it: prune_heads(it, 5, _scores()),
            "^keep 5: choose from 1 to 4, the number of h",
        ),
        (
            lambda it: prune_heads(it, 0, _scores()),
            "^keep 0: choose from 1 to 4, the number of h",
        ),
        (
            lambda it: prune_width(it, 33, _scores()),
            "^keep 33: choose from 1 to 32, the hidden",
        ),
        (
            lambda it: prune_width(it, 8, Importance(np.ones((2, 4)), np.ones(1), np.ones(9))),
            r"shape \(9,\), but the classifier has \(32,\)",
        ),
        (
            lambda it: cut_student(it, it, None, (0,), width=1.5),
            "^student_width is 1.5; give a share of the teacher's width",
        ),
    ],
)
def test_invalid_arguments(
    prune: Callable[[TextClassifier], object], message: str, classifier: TextClassifier
) -> None:
    with pytest.raises(ModelError, match=message):
        prune(classifier)


def test_unsupported_architecture(classifier: TextClassifier) -> None:
    shared = _random("mpnet", classifier)
    with pytest.raises(ModelError, match=r"^pruning heads of mpnet is not supported"):
        prune_heads(shared, 2, _scores())
    with pytest.raises(ModelError, match=r"^pruning the hidden size of mpnet is not supported"):
        prune_width(shared, 16, _scores())
