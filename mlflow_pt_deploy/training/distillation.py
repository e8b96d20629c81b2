"""Knowledge distillation: student initialization, teacher labels and distillation losses.

Soft labels with temperature follow Hinton, Vinyals & Dean (2015). Initializing a student from the
teacher's layers follows DistilBERT (Sanh et al. 2019). Labeling each augmented view of an image
follows Beyer et al. (2022). The similarity loss is from similarity-preserving distillation (Tung &
Mori 2019).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from mlflow_pt_deploy.data import Split
from mlflow_pt_deploy.errors import ModelError
from mlflow_pt_deploy.models import (
    Classifier,
    ImageClassifier,
    TextClassifier,
    new_mobilenet,
    new_static,
    shrink,
)
from mlflow_pt_deploy.models.static import FREQUENT
from mlflow_pt_deploy.preprocessing import Row
from mlflow_pt_deploy.system import interrupt
from mlflow_pt_deploy.system.progress import progress
from mlflow_pt_deploy.training.augmentation import make_texts
from mlflow_pt_deploy.training.inference import Tensors, predict_batches, to_device
from mlflow_pt_deploy.training.training_state import Loss


@dataclass(frozen=True)
class TeacherLabels:
    """Outputs of a teacher for a split.

    Attributes:
        split: The rows. Augmented texts have the teacher's label.
        logits: The teacher's logits, float32 (rows, classes).
        features: Inputs of the teacher's last layer, float16 (rows, width).
    """

    split: Split
    logits: npt.NDArray[np.float32]
    features: npt.NDArray[np.float16]


def evenly_spaced(depth: int, keep: int) -> tuple[int, ...]:
    """Return evenly spaced layer indices, from the first layer to the last.

    Args:
        depth: Number of layers of the teacher.
        keep: Number of layers of the student, 1 to `depth`.

    Raises:
        ModelError: `keep` is out of range.
    """
    if not 1 <= keep <= depth:
        raise ModelError(f"student_layers {keep}: choose from 1 to {depth}, the teacher's depth.")
    return tuple(int(index) for index in np.linspace(0, depth - 1, keep).round())


def kept_layers(depth: int, keep: int, chosen: str = "") -> tuple[int, ...]:
    """Return the indices of the teacher's layers that a student keeps.

    Args:
        depth: Number of layers of the teacher.
        keep: Number of layers to keep if `chosen` is empty; they are evenly spaced.
        chosen: Layer indices, ascending and separated by commas, e.g. ``0,2,5``.

    Raises:
        ModelError: `keep` or an index is out of range, or the indices do not ascend.
    """
    if not chosen:
        return evenly_spaced(depth, keep)
    words = [word.strip() for word in chosen.split(",")]
    numbers = tuple(int(word) for word in words if word.isdecimal())
    in_range = len(numbers) == len(words) and max(numbers, default=depth) < depth
    if not in_range or sorted(set(numbers)) != list(numbers):
        raise ModelError(
            f"keep_layers is {chosen!r}; give numbers from 0 to {depth - 1}, ascending and "
            "separated by commas, e.g. 0,2,5."
        )
    return numbers


def start_student(
    teacher: Classifier,
    layers: int,
    chosen: str = "",
    *,
    width: float = 1.0,
    rows: Sequence[Row] = (),
    frequent: int = FREQUENT,
) -> Classifier:
    """Create an untrained student of a teacher.

    A student of a text classifier starts with the teacher's embeddings, head and some of its
    layers, or is a static student. A student of an image classifier is a new MobileNetV2.

    Args:
        teacher: The fine-tuned teacher.
        layers: Number of layers to keep, evenly spaced; 0 creates a static student.
        chosen: Layer indices to keep instead, see `kept_layers`.
        width: Share of MobileNetV2's channels.
        rows: Training rows; their word pieces get an embedding in a static student.
        frequent: See `new_static`.

    Raises:
        ModelError: The teacher has fewer layers, or a static student of images was requested.
    """
    if isinstance(teacher, ImageClassifier):
        if layers == 0:
            raise ModelError(
                "student_layers is 0 (a static student), which images do not support. Leave "
                "student_layers out: a student of images is a MobileNetV2."
            )
        return new_mobilenet(teacher, width=width)
    assert isinstance(teacher, TextClassifier)
    if layers == 0:
        return new_static(teacher, cast(Sequence[str], rows), frequent=frequent)
    return shrink(teacher, kept_layers(teacher.network.config.num_hidden_layers, layers, chosen))


def label_with_teacher(
    teacher: Classifier,
    train: Split,
    cache: Path,
    *,
    made: float = 0.0,
    seed: int = 0,
    device: str = "cpu",
) -> TeacherLabels:
    """Label the training rows and augmented texts with the teacher; results are cached.

    Args:
        teacher: The fine-tuned teacher.
        train: The rows to label.
        cache: Cache folder; file names contain the digests of the weights and of the rows.
        made: Number of augmented texts, as a multiple of train's rows, see `make_texts`.
        seed: Random seed of the augmented texts.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
    """
    labels = _label_split(teacher, train, cache, device)
    if not made:
        return labels
    rows = cast(Sequence[str], train.rows)
    texts = make_texts(rows, round(made * len(train)), seed=seed)
    unlabeled = Split(texts, np.zeros(len(texts), dtype=np.int64))
    new = _label_split(teacher, unlabeled, cache, device)
    targets = np.concatenate([train.targets, new.logits.argmax(1)])
    return TeacherLabels(
        Split(train.rows + texts, targets),
        np.concatenate([labels.logits, new.logits]),
        np.concatenate([labels.features, new.features]),
    )


def _label_split(teacher: Classifier, split: Split, cache: Path, device: str) -> TeacherLabels:
    path = cache / f"{_digest(teacher)}-{split.digest}.npz"
    if path.exists():
        with np.load(path, allow_pickle=False) as saved:
            return TeacherLabels(split, saved["logits"], saved["features"])
    capture = _FeatureCapture(teacher)
    logits = np.empty((len(split), len(teacher.labels)), dtype=np.float32)
    features = np.empty((len(split), capture.width), dtype=np.float16)
    batches = predict_batches(teacher, split.rows, device=device)
    with progress("labeling", len(split), "rows") as bar:
        for indices, batch_logits in batches:
            logits[indices], features[indices] = batch_logits.cpu(), capture.features().cpu()
            bar.update(len(indices))
    capture.remove()
    teacher.cpu()  # a GPU has room for the student
    cache.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    with interrupt.shielded():
        with temporary.open("wb") as file:
            np.savez(file, logits=logits, features=features)
        os.replace(temporary, path)
    return TeacherLabels(split, logits, features)


class _FeatureCapture:
    """Captures the input of a classifier's last linear layer with a forward hook."""

    def __init__(self, classifier: Classifier) -> None:
        linears = [m for m in classifier.network.modules() if isinstance(m, nn.Linear)]
        self._features: torch.Tensor | None = None
        self.width = linears[-1].in_features
        self._hook = linears[-1].register_forward_pre_hook(self._on_forward)

    def _on_forward(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._features = inputs[0].flatten(1)

    def features(self) -> torch.Tensor:
        """Features of the last batch, (rows, width)."""
        assert self._features is not None  # called after a forward pass only
        return self._features

    def remove(self) -> None:
        self._hook.remove()


def _digest(classifier: Classifier) -> str:
    sha = hashlib.sha256()
    for name, tensor in sorted(classifier.cpu().state_dict().items()):
        sha.update(name.encode() + tensor.numpy().tobytes())
    return sha.hexdigest()[:16]


def distillation_loss(
    teacher_logits: npt.NDArray[np.float32],
    targets: npt.NDArray[np.int64],
    *,
    temperature: float = 2.0,
    weight: float = 0.7,
) -> Loss:
    """Return the distillation loss: KL divergence to the teacher's soft labels plus cross entropy.

    Args:
        teacher_logits: Logits of the teacher on train, float32 (rows, classes).
        targets: Labels of train, int64 (rows,).
        temperature: Softens both distributions; the divergence is multiplied by its square.
        weight: Weight of the soft labels, 0 to 1.
    """
    teacher, truth = torch.from_numpy(teacher_logits), torch.from_numpy(targets)

    def loss(logits: torch.Tensor, rows: torch.Tensor, inputs: Tensors = ()) -> torch.Tensor:
        soft, hard = (to_device(it[rows], logits.device) for it in (teacher, truth))
        return _combined_loss(logits, soft, hard, temperature, weight)

    return loss


def online_distillation_loss(
    teacher: Classifier,
    targets: npt.NDArray[np.int64],
    *,
    temperature: float = 2.0,
    weight: float = 0.7,
) -> Loss:
    """Return a distillation loss that runs the teacher on every batch.

    Used for images, which are augmented anew in each epoch: the teacher labels the same view that
    the student sees.

    Args:
        teacher: The fine-tuned teacher, on the student's device.
        targets: Labels of train, int64 (rows,).
        temperature, weight: As in `distillation_loss`.
    """
    truth = torch.from_numpy(targets)
    teacher.eval()

    def loss(logits: torch.Tensor, rows: torch.Tensor, inputs: Tensors) -> torch.Tensor:
        with torch.no_grad():
            soft = teacher(*inputs).float()
        hard = to_device(truth[rows], logits.device)
        return _combined_loss(logits, soft, hard, temperature, weight)

    return loss


def _combined_loss(
    logits: torch.Tensor, soft: torch.Tensor, hard: torch.Tensor, temperature: float, weight: float
) -> torch.Tensor:
    """Weighted sum; `logits` and `soft` are (batch, classes), `hard` is int64 (batch,)."""
    student = functional.log_softmax(logits / temperature, dim=1)
    teacher = functional.log_softmax(soft / temperature, dim=1)
    divergence = functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
    truth = functional.cross_entropy(logits, hard)
    return weight * temperature**2 * divergence + (1 - weight) * truth


def add_similarity_loss(
    loss: Loss, student: Classifier, features: npt.NDArray[np.float16], weight: float
) -> Loss:
    """Add a similarity-preserving loss to `loss`.

    The added term is the mean squared difference between the student's and the teacher's matrix of
    cosine similarities among a batch's rows, computed on the inputs of the last layers. The feature
    widths may differ.

    Args:
        loss: The loss to extend.
        student: The student that will be trained.
        features: Features of the teacher on train, float16 (rows, width).
        weight: Weight of the added term; 0 returns `loss` unchanged.
    """
    if not weight:
        return loss
    capture, teacher = _FeatureCapture(student), torch.from_numpy(features)

    def total(logits: torch.Tensor, rows: torch.Tensor, inputs: Tensors = ()) -> torch.Tensor:
        actual = _cosine_similarities(capture.features().float())
        target = _cosine_similarities(to_device(teacher[rows].float(), actual.device))
        return loss(logits, rows, inputs) + weight * functional.mse_loss(actual, target)

    return total


def _cosine_similarities(features: torch.Tensor) -> torch.Tensor:
    unit = functional.normalize(features, dim=1)
    return unit @ unit.T
