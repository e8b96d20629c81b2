"""Importance scores, and pruning of feed-forward neurons."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny.pruning import ROWS, is_unchanged, random_network, reloaded, weights
from torch import nn
from torch.nn import functional

from mlflow_pt_deploy.data import Splits
from mlflow_pt_deploy.errors import DataError, ModelError
from mlflow_pt_deploy.models import TextClassifier, load_classifier
from mlflow_pt_deploy.pruning import (
    Importance,
    prune_neurons,
    prune_vocabulary,
    taylor_importance,
    teacher_importance,
)
from mlflow_pt_deploy.training.distillation import distillation_loss, start_student
from mlflow_pt_deploy.training.inference import evaluate, predict_logits
from mlflow_pt_deploy.training.optimization import Schedule
from mlflow_pt_deploy.training.trainer import fit

TARGETS = np.array([0, 1, 2, 0])  # the last one is wrong, so that its loss is large
ZEROED = (range(40), range(24, 64))  # 40 of 64 neurons in each of the two layers
KINDS = ("bert", "camembert", "distilbert", "electra", "mpnet", "roberta", "xlm-roberta")


@pytest.fixture
def classifier(tiny_model: Path) -> TextClassifier:
    return load_classifier(str(tiny_model))


@pytest.mark.parametrize("kind", KINDS)
def test_neurons_without_effect_score_0_and_are_pruned_first(
    kind: str, classifier: TextClassifier, tmp_path: Path
) -> None:
    wide = TextClassifier(random_network(kind), classifier.tokenizer)
    downs = [it for it in wide.modules() if isinstance(it, nn.Linear) and it.in_features == 64]
    with torch.no_grad():
        for down, zeroed in zip(downs, ZEROED, strict=True):
            down.weight[:, list(zeroed)] = 0
    importance = taylor_importance(wide, ROWS, TARGETS % 2)
    for scores, zeroed in zip(importance.neurons, ZEROED, strict=True):
        assert np.flatnonzero(scores == 0).tolist() == list(zeroed)
    assert importance.heads.shape == (2, 4)
    assert (importance.heads > 0).all()

    before = weights(wide)
    pruned = prune_neurons(wide, 24, importance)
    assert is_unchanged(wide, before)
    expected = predict_logits(wide, ROWS)
    np.testing.assert_allclose(predict_logits(pruned, ROWS), expected, rtol=0, atol=1e-6)
    sizes = [sum(weight.numel() for weight in it.parameters()) for it in (wide, pruned)]
    assert sizes[0] - sizes[1] == 2 * 40 * (32 + 1 + 32)  # input weights, bias, output weights
    again = reloaded(pruned, tmp_path / "pruned")
    assert (predict_logits(again, ROWS) == predict_logits(pruned, ROWS)).all()


def test_most_important_neurons_keep_their_order(classifier: TextClassifier) -> None:
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


def test_scores_equal_numerical_gradients(classifier: TextClassifier) -> None:
    """Scaling the output of a part up and down a little gives the same slope of the loss."""
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
    """Mean over the rows of the absolute central difference of the loss by scaling `columns`."""
    step, kept, losses = 1e-4, columns.detach().clone(), []
    inputs = [torch.from_numpy(it) for it in classifier.preprocessor(ROWS).values()]
    truth = torch.from_numpy(TARGETS)
    with torch.no_grad():
        for factor in (1 + step, 1 - step):
            columns.copy_(kept * factor)
            losses.append(functional.cross_entropy(classifier(*inputs), truth, reduction="none"))
        columns.copy_(kept)
    return ((losses[0] - losses[1]) / (2 * step)).abs().mean().item()


def test_scores_do_not_depend_on_the_batch_size(
    classifier: TextClassifier,
) -> None:
    before = weights(classifier)
    classifier.train()
    single = taylor_importance(classifier, ROWS, TARGETS, batch_size=1)
    batched = taylor_importance(classifier, ROWS, TARGETS, batch_size=3)
    np.testing.assert_allclose(single.heads, batched.heads, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(single.neurons, batched.neurons, rtol=1e-3, atol=1e-6)
    assert classifier.training
    assert is_unchanged(classifier, before)
    assert all(it.requires_grad and it.grad is None for it in classifier.parameters())
    assert not any(module._forward_pre_hooks for module in classifier.modules())


def test_training_recovers_a_pruned_student(
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
def test_number_of_neurons_out_of_range(classifier: TextClassifier, keep: int) -> None:
    importance = Importance(np.ones((2, 4)), np.ones((2, 64)), np.ones(32))
    with pytest.raises(ModelError, match=rf"^keep {keep}: choose from 1 to 64, the number of n"):
        prune_neurons(classifier, keep, importance)


def test_importance_of_another_classifier(classifier: TextClassifier) -> None:
    importance = Importance(np.ones((3, 4)), np.ones((3, 64)), np.ones(32))
    with pytest.raises(ModelError, match=r"shape \(3, 64\), but the classifier has \(2, 64\)"):
        prune_neurons(classifier, 8, importance)


@pytest.mark.parametrize("rows", [(), ROWS[:3]])
def test_rows_without_labels(classifier: TextClassifier, rows: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match=rf"^{len(rows)} rows with 4 labels"):
        taylor_importance(classifier, rows, TARGETS)


def test_unsupported_architecture(classifier: TextClassifier) -> None:
    other = TextClassifier(random_network("albert"), classifier.tokenizer)
    importance = Importance(np.ones((2, 4)), np.ones((2, 64)), np.ones(32))
    for prune in (
        lambda: prune_vocabulary(other, ROWS),
        lambda: prune_neurons(other, 8, importance),
        lambda: taylor_importance(other, ROWS, TARGETS),
    ):
        with pytest.raises(ModelError, match=r"^albert cannot be pruned; supported are bert, .*mp"):
            prune()
