"""Image classifiers: untrained ResNet and MobileNetV2, loading, augmentation and training."""

from __future__ import annotations

import json
import shutil
from math import log
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COLOURS, picture

from mlflow_pt_deploy.data import Splits
from mlflow_pt_deploy.errors import ModelError
from mlflow_pt_deploy.models import (
    ImageClassifier,
    TextClassifier,
    load_classifier,
    new_classifier,
    new_mobilenet,
    new_resnet,
    save_classifier,
)
from mlflow_pt_deploy.training import training_state
from mlflow_pt_deploy.training.distillation import online_distillation_loss, start_student
from mlflow_pt_deploy.training.inference import evaluate, predict_logits
from mlflow_pt_deploy.training.optimization import Schedule
from mlflow_pt_deploy.training.process_group import ProcessGroup
from mlflow_pt_deploy.training.trainer import cross_entropy, fit

ROWS = [picture("RGB", (9, 7), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]


@pytest.fixture
def teacher(tiny_resnet: Path) -> ImageClassifier:
    classifier = load_classifier(str(tiny_resnet))
    assert isinstance(classifier, ImageClassifier)
    return classifier


@pytest.fixture
def folder(tiny_resnet: Path, tmp_path: Path) -> Path:
    """A copy to modify."""
    return Path(shutil.copytree(tiny_resnet, tmp_path / "model"))


def count(classifier: torch.nn.Module) -> float:
    return sum(parameter.numel() for parameter in classifier.parameters()) / 1e6


def test_untrained_resnet() -> None:
    classifier = new_resnet(COLOURS, 64)
    assert 11 < count(classifier) < 11.5  # millions, ResNet-18 without its 1,000 classes
    assert not classifier.pretrained
    assert classifier.labels == COLOURS
    assert predict_logits(classifier, ROWS).shape == (3, 3)
    assert classifier.preprocessor(ROWS)["pixel_values"].shape == (3, 3, 64, 64)
    assert 2.7 < count(new_resnet(COLOURS, 32)) < 2.9  # half as wide
    with pytest.raises(ModelError, match="image_size is 31; give 32 pixels or more"):
        new_resnet(COLOURS, 31)


def test_mobilenet_has_the_inputs_of_its_teacher() -> None:
    teacher = new_resnet(COLOURS, 64)
    student = start_student(teacher, 3)
    assert isinstance(student, ImageClassifier)
    assert 2.2 < count(student) < 2.3  # MobileNetV2 without its 1,000 classes
    assert student.labels == COLOURS
    assert student.preprocessor.settings == teacher.preprocessor.settings
    assert not student.pretrained and not student.training
    assert 0.6 < count(start_student(teacher, 3, width=0.5)) < 0.8
    with pytest.raises(ModelError, match="student_width is 0; give a number above 0"):
        start_student(teacher, 3, width=0)
    with pytest.raises(ModelError, match="student_layers is 0.* images do not support"):
        start_student(teacher, 0)


def test_auto_teacher(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    monkeypatch.setattr("mlflow_pt_deploy.models.loading._minilm", lambda: str(tiny_model))
    assert isinstance(new_classifier("auto", ["a", "b"], ["a text"]), TextClassifier)
    images = new_classifier("auto", ["a", "b"], [picture("L", (40, 9), 0)])
    assert isinstance(images, ImageClassifier)
    assert images.preprocessor.settings.height == 64
    larger = new_classifier("auto", ["a", "b"], ROWS, image_size=96)
    assert larger.preprocessor([ROWS[0]])["pixel_values"].shape == (1, 3, 96, 96)
    with pytest.raises(ModelError, match="no teacher is given. Give a fine-tuned model"):
        load_classifier("auto")


def test_save_and_load(teacher: ImageClassifier, tmp_path: Path) -> None:
    save_classifier(teacher, tmp_path / "saved")
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert names == {"config.json", "model.safetensors", "preprocessor_config.json"}
    again = load_classifier(str(tmp_path / "saved"))
    assert again.labels == COLOURS
    assert again.pretrained
    assert (predict_logits(again, ROWS) == predict_logits(teacher, ROWS)).all()


def test_new_head(tiny_resnet: Path) -> None:
    classifier = new_classifier(str(tiny_resnet), ["a", "b", "c", "d"])
    assert classifier.labels == ("a", "b", "c", "d")
    assert predict_logits(classifier, ROWS).shape == (3, 4)


@pytest.mark.parametrize("name", ["preprocessor_config.json", "config.json", "model.safetensors"])
def test_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ModelError, match="no classifier can be loaded"):
        load_classifier(str(folder))


def test_unsupported_number_of_channels(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf8"))
    (folder / "config.json").write_text(json.dumps(config | {"num_channels": 1}), encoding="utf8")
    with pytest.raises(ModelError, match="model has 1 input channels; choose a model with three"):
        new_classifier(str(folder), COLOURS)


def test_augmentation_of_grey_and_color_images(
    teacher: ImageClassifier,
) -> None:
    random = np.random.default_rng(0)
    ramp = np.tile(np.arange(32, dtype=np.uint8) * 8, (32, 1))
    grey, colour = np.stack([ramp] * 3, axis=2), np.stack([ramp, ramp.T, ramp], axis=2)
    shown = teacher.augment([grey] * 40, random)
    assert all(image.shape == grey.shape for image in shown)
    assert all((np.diff(image[..., 0].astype(int)) >= 0).all() for image in shown)  # not mirrored
    assert len({image.tobytes() for image in shown}) == 9  # -4 to 4; vertical shifts have no effect
    shown = teacher.augment([colour] * 40, random)
    assert {image.shape for image in shown} == {colour.shape}
    rising = [bool(image[0, 0, 0] < image[0, -1, 0]) for image in shown]
    assert 10 < sum(rising) < 30
    assert all(image[0, 0, 1] < image[-1, 0, 1] for image in shown)  # not flipped vertically
    spans = [abs(int(image[0, -1, 0]) - int(image[0, 0, 0])) for image in shown]
    assert min(spans) > 0.5 * 248
    assert len(set(spans)) > 5


def test_online_distillation_loss() -> None:
    # At temperature 2 the teacher predicts (3/4, 1/4), the student (1/2, 1/2).
    class Teacher(torch.nn.Module):
        def forward(self, view: torch.Tensor) -> torch.Tensor:
            return view

    view, student = torch.tensor([[2 * log(3), 0.0]]), torch.zeros(1, 2, requires_grad=True)
    loss = online_distillation_loss(Teacher(), np.array([1]), temperature=2.0, weight=0.25)  # type: ignore[arg-type]
    divergence = 3 / 4 * log(3 / 2) + 1 / 4 * log(1 / 2)
    expected = 0.25 * 4 * divergence + 0.75 * log(2)
    assert loss(student, torch.tensor([0]), (view,)).item() == pytest.approx(expected, rel=1e-6)


def test_student_learns_from_soft_labels(
    teacher: ImageClassifier, image_splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    # rows are encoded again at each step
    monkeypatch.setattr(training_state, "_MAX_ENCODED_BYTES", 1000)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student = new_mobilenet(teacher, width=0.125)
    loss = online_distillation_loss(teacher, image_splits.train.targets, weight=1.0)
    fit(student, image_splits, loss, Schedule(epochs=6, learning_rate=5e-3, batch_size=8))
    assert evaluate(student, image_splits.test) > 0.8
    assert evaluate(teacher, image_splits.test) == 1


def test_batches_of_one_row_are_skipped(teacher: ImageClassifier, image_splits: Splits) -> None:
    """Batch norm needs two rows: 96 rows in batches of 5 leave one."""
    schedule = Schedule(epochs=1, learning_rate=1e-4, batch_size=5)
    state = training_state.TrainingState(
        teacher, image_splits.train, schedule, "cpu", ProcessGroup()
    )
    assert {len(batch) for batch in state._batches(0)} == {5, 2}
    assert fit(teacher, image_splits, cross_entropy(image_splits.train.targets), schedule)
