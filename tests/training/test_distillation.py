"""Student initialization, teacher labels, and losses compared with values computed by hand."""

from __future__ import annotations

from math import log
from pathlib import Path

import numpy as np
import pytest
import torch

from mlflow_pt_deploy.data import Splits
from mlflow_pt_deploy.errors import ModelError
from mlflow_pt_deploy.models import Classifier, load_classifier, save_classifier, shrink
from mlflow_pt_deploy.training.distillation import (
    add_similarity_loss,
    distillation_loss,
    evenly_spaced,
    kept_layers,
    label_with_teacher,
    start_student,
)
from mlflow_pt_deploy.training.inference import Tensors, evaluate, predict_logits
from mlflow_pt_deploy.training.optimization import Schedule
from mlflow_pt_deploy.training.trainer import fit

ROWS = ("my card", "i want a refund please", "")


@pytest.fixture
def teacher(tiny_model: Path) -> Classifier:
    return load_classifier(str(tiny_model))


@pytest.mark.parametrize(
    ("depth", "keep", "layers"),
    [
        (6, 1, (0,)),
        (6, 2, (0, 5)),
        (6, 3, (0, 2, 5)),  # 2.5 rounds to even
        (6, 4, (0, 2, 3, 5)),
        (12, 6, (0, 2, 4, 7, 9, 11)),
        (6, 6, (0, 1, 2, 3, 4, 5)),
        (1, 1, (0,)),
    ],
)
def test_evenly_spaced(depth: int, keep: int, layers: tuple[int, ...]) -> None:
    assert evenly_spaced(depth, keep) == layers


def test_evenly_spaced_layers_are_distinct() -> None:
    for depth in range(1, 50):
        for keep in range(1, depth + 1):
            assert len(set(evenly_spaced(depth, keep))) == keep


@pytest.mark.parametrize("keep", [0, -1, 7])
def test_number_of_layers_out_of_range(keep: int) -> None:
    with pytest.raises(ModelError, match=f"^student_layers {keep}: choose from 1 to 6, the teach"):
        evenly_spaced(6, keep)


def test_student_with_all_layers_equals_its_teacher(teacher: Classifier) -> None:
    student = start_student(teacher, 2)
    assert student.labels == teacher.labels
    assert not student.training
    assert (predict_logits(student, ROWS) == predict_logits(teacher, ROWS)).all()


@pytest.mark.parametrize("layer", [0, 1])
def test_student_of_one_layer_copies_that_layer(teacher: Classifier, layer: int) -> None:
    student = shrink(teacher, [layer])
    expected = teacher.network.bert.encoder.layer[layer].state_dict()
    (kept,) = student.network.bert.encoder.layer
    assert all(torch.equal(kept.state_dict()[name], expected[name]) for name in expected)
    assert student.network.config.num_hidden_layers == 1
    embeddings = "network.bert.embeddings.word_embeddings.weight"
    assert torch.equal(student.state_dict()[embeddings], teacher.state_dict()[embeddings])


def test_student_of_one_layer_starts_from_the_first(teacher: Classifier) -> None:
    student, first = start_student(teacher, 1), shrink(teacher, [0])
    assert (predict_logits(student, ROWS) == predict_logits(first, ROWS)).all()


def test_student_shares_no_tensor_with_its_teacher(teacher: Classifier) -> None:
    before = predict_logits(teacher, ROWS)
    student = start_student(teacher, 1)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert teacher.network.config.num_hidden_layers == 2
    assert (predict_logits(teacher, ROWS) == before).all()


def test_student_survives_a_save_and_load(teacher: Classifier, tmp_path: Path) -> None:
    student = start_student(teacher, 1)
    save_classifier(student, tmp_path / "student")
    loaded = load_classifier(str(tmp_path / "student"))
    assert (predict_logits(loaded, ROWS) == predict_logits(student, ROWS)).all()


@pytest.mark.parametrize("layers", [[], [2], [-1], [0, 5]])
def test_layer_index_out_of_range(teacher: Classifier, layers: list[int]) -> None:
    with pytest.raises(ModelError, match=r"student layers \[.*\]: choose from 0 to 1\."):
        shrink(teacher, layers)


@pytest.mark.parametrize("layers", [-1, 3])
def test_too_many_or_negative_layers(teacher: Classifier, layers: int) -> None:
    with pytest.raises(ModelError, match=f"student_layers {layers}: choose from 1 to 2"):
        start_student(teacher, layers)


# Probabilities at temperature 2: teacher (3/4, 1/4), (1/2, 1/2); student (1/2, 1/2), (3/4, 1/4).
TEACHER = np.array([[2 * log(3), 0], [0, 0]], dtype=np.float32)
STUDENT = torch.tensor([[0, 0], [2 * log(3), 0]])
TARGETS = np.array([0, 1])
DIVERGENCE = ((3 / 4 * log(3 / 2) + 1 / 4 * log(1 / 2)) + 1 / 2 * log(4 / 3)) / 2
HARD = (log(2) + log(10)) / 2  # softmax(2 log 3, 0) is (9/10, 1/10)


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_distillation_loss_by_hand(weight: float) -> None:
    loss = distillation_loss(TEACHER, TARGETS, temperature=2.0, weight=weight)
    expected = weight * 4 * DIVERGENCE + (1 - weight) * HARD
    assert loss(STUDENT, torch.tensor([0, 1])).item() == pytest.approx(expected, rel=1e-6)


def test_soft_labels_are_looked_up_by_row() -> None:
    loss = distillation_loss(TEACHER, TARGETS, temperature=2.0, weight=0.25)
    expected = 0.25 * 4 * DIVERGENCE + 0.75 * HARD
    assert loss(STUDENT.flip(0), torch.tensor([1, 0])).item() == pytest.approx(expected, rel=1e-6)
    soft = distillation_loss(TEACHER, TARGETS, temperature=2.0, weight=1.0)
    assert soft(STUDENT[1:], torch.tensor([1])).item() == pytest.approx(2 * log(4 / 3), rel=1e-6)


def test_default_temperature_and_weight() -> None:
    expected = 0.7 * 4 * DIVERGENCE + 0.3 * HARD
    actual = distillation_loss(TEACHER, TARGETS)(STUDENT, torch.tensor([0, 1]))
    assert actual.item() == pytest.approx(expected, rel=1e-6)


def test_loss_scales_with_the_square_of_the_temperature() -> None:
    rows = torch.tensor([0, 1])
    cold = distillation_loss(TEACHER, TARGETS, temperature=1.0, weight=1.0)(STUDENT, rows)
    warm = distillation_loss(3 * TEACHER, TARGETS, temperature=3.0, weight=1.0)(3 * STUDENT, rows)
    assert warm.item() == pytest.approx(9 * cold.item(), rel=1e-5)


def test_loss_and_gradient_are_zero_for_equal_logits() -> None:
    logits = torch.from_numpy(TEACHER).requires_grad_()
    loss = distillation_loss(TEACHER, TARGETS, temperature=4.0, weight=1.0)(
        logits, torch.tensor([0, 1])
    )
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert logits.grad is not None
    assert logits.grad.abs().max().item() < 1e-6


def test_student_learns_from_soft_labels(teacher: Classifier, tiny_splits: Splits) -> None:
    logits = predict_logits(teacher, tiny_splits.train.rows)
    student = start_student(teacher, 1)
    torch.nn.init.zeros_(student.network.classifier.weight)
    assert evaluate(student, tiny_splits.test) == pytest.approx(1 / 3)  # always the same label
    loss = distillation_loss(logits, tiny_splits.train.targets)
    fit(student, tiny_splits, loss, Schedule(epochs=4, learning_rate=3e-3, batch_size=10))
    assert evaluate(student, tiny_splits.test) > 0.9


def test_teacher_labels_are_cached(
    teacher: Classifier, tiny_splits: Splits, tmp_path: Path
) -> None:
    first = label_with_teacher(teacher, tiny_splits.train, tmp_path / "logits")
    assert (first.logits == predict_logits(teacher, tiny_splits.train.rows)).all()
    (kept,) = (tmp_path / "logits").iterdir()
    # Change the cached logits to detect whether they are read.
    np.savez(kept, logits=first.logits + 1, features=first.features)
    again = label_with_teacher(teacher, tiny_splits.train, tmp_path / "logits")
    assert (again.logits == first.logits + 1).all()
    label_with_teacher(teacher, tiny_splits.validation, tmp_path / "logits")  # other rows
    teacher.network.classifier.bias.data += 1  # other weights
    other = label_with_teacher(teacher, tiny_splits.train, kept.parent)
    assert np.allclose(other.logits, first.logits + 1)
    assert len(list(kept.parent.iterdir())) == 3


def test_features_are_the_inputs_of_the_last_layer(
    teacher: Classifier, tiny_splits: Splits, tmp_path: Path
) -> None:
    labels = label_with_teacher(teacher, tiny_splits.train, tmp_path)
    last = teacher.network.classifier
    assert labels.features.shape == (len(tiny_splits.train), last.in_features)
    logits = torch.from_numpy(labels.features).float() @ last.weight.T + last.bias
    np.testing.assert_allclose(logits.detach().numpy(), labels.logits, atol=2e-2)  # stored as fp16


def test_augmented_texts_have_the_teachers_label(
    teacher: Classifier, tiny_splits: Splits, tmp_path: Path
) -> None:
    train = tiny_splits.train
    labels = label_with_teacher(teacher, train, tmp_path, made=0.5)
    made = labels.split.rows[len(train) :]
    assert labels.split.rows[: len(train)] == train.rows
    assert len(made) == round(0.5 * len(train))
    assert not set(made) & set(train.rows)
    assert (labels.split.targets[: len(train)] == train.targets).all()
    logits = predict_logits(teacher, labels.split.rows)
    np.testing.assert_allclose(labels.logits, logits, atol=1e-5)
    assert (labels.split.targets[len(train) :] == labels.logits[len(train) :].argmax(1)).all()
    assert len(labels.features) == len(labels.split)
    assert (
        label_with_teacher(teacher, train, tmp_path, made=0.5).split.digest == labels.split.digest
    )
    assert (
        label_with_teacher(teacher, train, tmp_path, made=0.5, seed=1).split.digest
        != labels.split.digest
    )


@pytest.mark.parametrize("flags", [(), ("amx_bf16",)])
def test_similarity_loss_works_across_feature_widths(
    teacher: Classifier,
    tiny_splits: Splits,
    tmp_path: Path,
    flags: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "mlflow_pt_deploy.training.optimization.cpu_flags", lambda: frozenset(flags)
    )
    labels = label_with_teacher(teacher, tiny_splits.train, tmp_path)

    def distance(student: Classifier) -> float:
        def zero(logits: torch.Tensor, rows: torch.Tensor, inputs: Tensors = ()) -> torch.Tensor:
            return logits.sum() * 0

        similarity = add_similarity_loss(zero, student, labels.features, 1.0)
        student.eval()
        student(*map(torch.from_numpy, student.preprocessor(tiny_splits.train.rows).values()))
        rows = torch.arange(len(tiny_splits.train))
        return similarity(torch.zeros(1), rows).item()

    torch.manual_seed(0)
    student = start_student(teacher, 0)  # a static student, of another width
    before = distance(student)
    loss = distillation_loss(labels.logits, labels.split.targets)
    loss = add_similarity_loss(loss, student, labels.features, 10.0)
    fit(student, tiny_splits, loss, Schedule(epochs=4, learning_rate=3e-3, batch_size=10))
    assert distance(student) < before / 2


def test_explicit_layers(teacher: Classifier) -> None:
    assert kept_layers(6, 3) == (0, 2, 5)
    assert kept_layers(6, 3, "0, 5") == (0, 5)
    last = start_student(teacher, 1, "1")
    assert (predict_logits(last, ROWS) == predict_logits(shrink(teacher, [1]), ROWS)).all()
    for wrong in ("6", "2,1", "1,1", "first", "-1", ","):
        with pytest.raises(ModelError, match="give numbers from 0 to 5, ascending"):
            kept_layers(6, 3, wrong)
