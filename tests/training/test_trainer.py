"""The training loop on 90 rows: learning, best-epoch selection, checkpoints and resuming."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mlflow_pt_deploy.data import Split, Splits
from mlflow_pt_deploy.errors import DataError
from mlflow_pt_deploy.models import Classifier, load_classifier
from mlflow_pt_deploy.training import optimization, training_state
from mlflow_pt_deploy.training.inference import Tensors, evaluate, predict_logits
from mlflow_pt_deploy.training.optimization import Schedule
from mlflow_pt_deploy.training.trainer import cross_entropy, fit
from mlflow_pt_deploy.training.training_state import Epoch, Loss

FAST = Schedule(epochs=3, learning_rate=3e-3, batch_size=20)  # 90 rows: 5 steps per epoch
STEPS = 5


@pytest.fixture
def classifier(tiny_model: Path) -> Classifier:
    return load_classifier(str(tiny_model))


@pytest.fixture
def relabeled(tiny_splits: Splits) -> Splits:
    """The same rows with other labels, so that the accuracy of `tiny_model` is 0."""

    def relabel(split: Split) -> Split:
        return Split(split.rows, (split.targets + 1) % 3)

    train, validation, test = map(
        relabel, (tiny_splits.train, tiny_splits.validation, tiny_splits.test)
    )
    return replace(tiny_splits, train=train, validation=validation, test=test)


class Stopped(Exception):
    """Stands for Ctrl-C."""


def stopped_after(steps: int, loss: Loss) -> Loss:
    """Return the loss, which raises `Stopped` after `steps` steps."""
    left = iter(range(steps))

    def counted(logits: torch.Tensor, rows: torch.Tensor, inputs: Tensors = ()) -> torch.Tensor:
        if next(left, None) is None:
            raise Stopped
        return loss(logits, rows)

    return counted


def weights(classifier: Classifier) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in classifier.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return list(first) == list(second) and all(torch.equal(first[n], second[n]) for n in first)


def without_durations(epochs: list[Epoch]) -> list[Epoch]:
    return [replace(epoch, seconds=0.0) for epoch in epochs]


def test_model_learns(classifier: Classifier, relabeled: Splits) -> None:
    assert evaluate(classifier, relabeled.validation) == 0.0
    schedule = Schedule(epochs=7, learning_rate=3e-3, batch_size=10)
    reported: list[Epoch] = []
    loss = cross_entropy(relabeled.train.targets)
    epochs = fit(classifier, relabeled, loss, schedule, on_epoch=reported.append)
    assert reported == epochs
    assert [epoch.number for epoch in epochs] == [1, 2, 3, 4, 5, 6, 7]
    assert epochs[-1].train_loss < epochs[0].train_loss / 2
    assert all(epoch.seconds > 0 for epoch in epochs)
    assert evaluate(classifier, relabeled.test) > 0.9
    assert not classifier.training


def test_bf16_is_used_for_training_but_not_for_evaluation(
    classifier: Classifier, relabeled: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimization, "cpu_flags", lambda: frozenset({"amx_bf16"}))
    entropy, seen = cross_entropy(relabeled.train.targets), set()

    def loss(logits: torch.Tensor, rows: torch.Tensor, inputs: Tensors = ()) -> torch.Tensor:
        seen.add(torch.is_autocast_enabled("cpu"))
        return entropy(logits, rows, inputs)

    epochs = fit(classifier, relabeled, loss, FAST)
    assert seen == {True}
    assert epochs[-1].train_loss < epochs[0].train_loss
    assert {tensor.dtype for tensor in classifier.parameters()} == {torch.float32}
    found = predict_logits(classifier, relabeled.test.rows)
    monkeypatch.setattr(optimization, "cpu_flags", frozenset)
    assert (predict_logits(classifier, relabeled.test.rows) == found).all()


def test_training_is_reproducible_by_seed(tiny_model: Path, relabeled: Splits) -> None:
    def trained(seed: int) -> dict[str, torch.Tensor]:
        classifier = load_classifier(str(tiny_model))
        schedule = replace(FAST, epochs=1, seed=seed)
        fit(classifier, relabeled, cross_entropy(relabeled.train.targets), schedule)
        return weights(classifier)

    first = trained(0)
    assert same(first, trained(0))
    assert not same(first, trained(1))


def test_best_epoch_is_kept(classifier: Classifier, tiny_splits: Splits) -> None:
    right = cross_entropy(tiny_splits.train.targets)
    wrong = cross_entropy((tiny_splits.train.targets + 1) % 3)
    steps = iter(range(3 * STEPS))
    kept: list[dict[str, torch.Tensor]] = []

    def loss_of_wrong_labels_later(
        logits: torch.Tensor, rows: torch.Tensor, inputs: Tensors = ()
    ) -> torch.Tensor:
        return (right if next(steps) < STEPS else wrong)(logits, rows)

    epochs = fit(
        classifier,
        tiny_splits,
        loss_of_wrong_labels_later,
        replace(FAST, learning_rate=2e-3),
        on_epoch=lambda epoch: kept.append(weights(classifier)),
    )
    accuracies = [epoch.validation_accuracy for epoch in epochs]
    assert accuracies[0] > max(accuracies[1:])
    assert same(weights(classifier), kept[0])
    assert evaluate(classifier, tiny_splits.validation) == accuracies[0]


def test_first_of_equal_epochs_is_kept(classifier: Classifier, tiny_splits: Splits) -> None:
    kept: list[dict[str, torch.Tensor]] = []
    epochs = fit(
        classifier,
        tiny_splits,
        cross_entropy(tiny_splits.train.targets),
        replace(FAST, learning_rate=1e-5),  # already at 1.0, hardly changes
        on_epoch=lambda epoch: kept.append(weights(classifier)),
    )
    assert [epoch.validation_accuracy for epoch in epochs] == [1.0, 1.0, 1.0]
    assert same(weights(classifier), kept[0])
    assert not same(kept[0], kept[2])


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param(2, id="in-the-first-epoch"),
        pytest.param(STEPS, id="between-epochs"),
        pytest.param(2 * STEPS + 3, id="in-the-last-epoch"),
    ],
)
def test_resumed_training_equals_an_uninterrupted_one(
    tiny_model: Path, relabeled: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    loss = cross_entropy(relabeled.train.targets)
    straight = load_classifier(str(tiny_model))
    expected = fit(straight, relabeled, loss, FAST)

    monkeypatch.setattr(training_state, "_CHECKPOINT_EVERY_S", 0.0)
    checkpoint = tmp_path / "work" / "teacher.checkpoint"
    with pytest.raises(Stopped):
        stopped = load_classifier(str(tiny_model))
        fit(stopped, relabeled, stopped_after(steps, loss), FAST, checkpoint=checkpoint)
    assert [path.name for path in checkpoint.parent.iterdir()] == ["teacher.checkpoint"]

    resumed = load_classifier(str(tiny_model))
    rest = stopped_after(3 * STEPS - steps, loss)  # no step runs twice
    torch.manual_seed(12345)  # as in a new process
    epochs = fit(resumed, relabeled, rest, FAST, checkpoint=checkpoint)
    assert without_durations(epochs) == without_durations(expected)
    assert same(weights(resumed), weights(straight))
    assert list(checkpoint.parent.iterdir()) == []


@pytest.mark.parametrize("epoch", [1, 3])
def test_resuming_after_a_stop_during_evaluation(
    tiny_model: Path, relabeled: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epoch: int
) -> None:
    loss = cross_entropy(relabeled.train.targets)
    straight = load_classifier(str(tiny_model))
    expected = fit(straight, relabeled, loss, FAST)

    monkeypatch.setattr(training_state, "_CHECKPOINT_EVERY_S", 0.0)
    checkpoint = tmp_path / "teacher.checkpoint"
    left = iter(range(epoch - 1))

    def interrupted(*args: object, **options: object) -> float:
        if next(left, None) is None:
            raise Stopped
        return evaluate(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(training_state, "evaluate", interrupted)
        fit(load_classifier(str(tiny_model)), relabeled, loss, FAST, checkpoint=checkpoint)

    resumed = load_classifier(str(tiny_model))
    epochs = fit(resumed, relabeled, loss, FAST, checkpoint=checkpoint)
    assert without_durations(epochs) == without_durations(expected)
    assert same(weights(resumed), weights(straight))


def test_checkpoint_of_another_schedule(
    classifier: Classifier, tiny_splits: Splits, tmp_path: Path
) -> None:
    loss = cross_entropy(tiny_splits.train.targets)
    checkpoint = tmp_path / "teacher.checkpoint"
    with pytest.raises(Stopped):
        fit(classifier, tiny_splits, stopped_after(STEPS, loss), FAST, checkpoint=checkpoint)
    other = replace(FAST, learning_rate=1e-3)
    with pytest.raises(DataError, match="was made with .*0.003.*this run has .*0.001.*Resume with"):
        fit(classifier, tiny_splits, loss, other, checkpoint=checkpoint)
    assert checkpoint.exists()


def test_loss_that_is_not_finite(classifier: Classifier, tiny_splits: Splits) -> None:
    def infinite(logits: torch.Tensor, rows: torch.Tensor, inputs: Tensors = ()) -> torch.Tensor:
        return logits.sum() * float("inf")

    with pytest.raises(DataError, match="loss is not a number; try a lower --learning-rate"):
        fit(classifier, tiny_splits, infinite, FAST)


def test_each_row_is_used_once_per_epoch(classifier: Classifier, tiny_splits: Splits) -> None:
    seen: list[list[int]] = []

    def watched(logits: torch.Tensor, rows: torch.Tensor, inputs: Tensors = ()) -> torch.Tensor:
        assert logits.shape == (len(rows), 3)
        assert logits.dtype == torch.float32
        seen.append(rows.tolist())
        return logits.sum() * 0

    fit(classifier, tiny_splits, watched, replace(FAST, epochs=2))
    assert [len(rows) for rows in seen].count(10) == 2  # 90 = 4 x 20 + 10
    first, second = seen[:STEPS], seen[STEPS:]
    assert sorted(sum(first, [])) == sorted(sum(second, [])) == list(range(90))
    assert first != second


def test_rows_of_a_batch_have_similar_lengths(classifier: Classifier, tiny_splits: Splits) -> None:
    lengths = [len(ids) for ids in classifier.preprocessor.encode(tiny_splits.train.rows)]
    spans: list[int] = []

    def watched(logits: torch.Tensor, rows: torch.Tensor, inputs: Tensors = ()) -> torch.Tensor:
        chosen = [lengths[row] for row in rows.tolist()]
        spans.append(max(chosen) - min(chosen))
        return logits.sum() * 0

    fit(classifier, tiny_splits, watched, replace(FAST, epochs=1))
    assert np.mean(spans) < (max(lengths) - min(lengths)) * 0.8


def test_cross_entropy_by_hand() -> None:
    loss = cross_entropy(np.array([0, 1, 0]))
    logits = torch.log(torch.tensor([[0.25, 0.75], [0.5, 0.5]]))
    expected = -(np.log(0.75) + np.log(0.5)) / 2  # rows 1 and 2: labels 1 and 0
    assert loss(logits, torch.tensor([1, 2])).item() == pytest.approx(expected)


def test_logits_are_in_the_order_of_the_rows(classifier: Classifier, tiny_splits: Splits) -> None:
    rows = tiny_splits.test.rows[:7]
    logits = predict_logits(classifier, rows, batch_size=2)
    single = np.concatenate([predict_logits(classifier, [row]) for row in rows])
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, single, atol=1e-5)
    assert (logits.argmax(axis=1) == tiny_splits.test.targets[:7]).all()


def test_logits_of_no_rows(classifier: Classifier) -> None:
    assert predict_logits(classifier, []).shape == (0, 3)


def test_accuracy_by_hand(classifier: Classifier) -> None:
    split = Split(("my card", "refund", "send it", "the chip"), np.array([0, 1, 2, 2]))
    assert evaluate(classifier, split) == 0.75
