"""What a student starts from, what it is taught, and the loss that teaches it.

Soft labels with temperature follow Hinton, Vinyals & Dean (2015); starting from the teacher's own
layers follows DistilBERT (Sanh et al. 2019); answering each view of an image anew follows Beyer et
al. (2022).
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
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
from mlflow_pt_deploy.train import Loss, Tensors, predict_logits


def spread(depth: int, keep: int) -> tuple[int, ...]:
    """Layers to keep, evenly spread from the first to the last.

    Args:
        depth: Layers of the teacher.
        keep: Layers of the student, 1 to `depth`.

    Raises:
        ModelError: `keep` is out of range.
    """
    if not 1 <= keep <= depth:
        raise ModelError(f"student_layers {keep}: choose from 1 to {depth}, the teacher's depth.")
    return tuple(int(index) for index in np.linspace(0, depth - 1, keep).round())


def start_student(teacher: Classifier, layers: int, *, width: float = 1.0) -> Classifier:
    """What learns from a teacher.

    Args:
        teacher: Of texts: the student has its embeddings, its head and some of its layers. Of
            images: the student is a MobileNetV2 from scratch.
        layers: How many layers of a teacher of texts; 0: a static student.
        width: Share of MobileNetV2's channels.

    Raises:
        ModelError: The teacher has fewer layers, or there is no such student of images.
    """
    if isinstance(teacher, ImageClassifier):
        if layers == 0:
            raise ModelError(
                "student_layers is 0, which means a static student, and there are none for "
                "images. Leave student_layers out: images get a MobileNetV2."
            )
        return new_mobilenet(teacher, width=width)
    assert isinstance(teacher, TextClassifier)
    if layers == 0:
        return new_static(teacher)
    return shrink(teacher, spread(teacher.network.config.num_hidden_layers, layers))


def teacher_logits(
    teacher: Classifier, split: Split, cache: Path, *, device: str = "cpu"
) -> npt.NDArray[np.float32]:
    """What the teacher answers to each row, float32 (rows, classes), computed once.

    Args:
        teacher: The fine-tuned teacher.
        split: The rows it labels.
        cache: Folder for a file that carries the digest of these weights and rows in its name.
        device: ``cpu`` or ``cuda``.
    """
    path = cache / f"{_digest(teacher)}-{split.digest}.npy"
    shape = (len(split), len(teacher.labels))
    if path.exists():
        known: npt.NDArray[np.float32] = np.load(path, allow_pickle=False)
        if known.shape == shape:
            return known
    logits = predict_logits(teacher, split.rows, device=device)
    cache.mkdir(parents=True, exist_ok=True)
    side = path.with_suffix(f".{os.getpid()}")
    with side.open("wb") as file:
        np.save(file, logits)
    os.replace(side, path)
    return logits


def _digest(classifier: Classifier) -> str:
    sha = hashlib.sha256()
    for name, tensor in sorted(classifier.cpu().state_dict().items()):
        sha.update(name.encode() + tensor.numpy().tobytes())
    return sha.hexdigest()[:16]


def soft_labels(
    teacher_logits: npt.NDArray[np.float32],
    targets: npt.NDArray[np.int64],
    *,
    temperature: float = 2.0,
    weight: float = 0.7,
) -> Loss:
    """Kullback-Leibler divergence to the teacher's softened answers, plus cross entropy.

    Args:
        teacher_logits: Logits of the teacher on train, float32 (rows, classes).
        targets: Labels of train, int64 (rows,).
        temperature: Softens both distributions; the gradient is scaled back by its square.
        weight: Share of the soft labels in the sum, 0 to 1.
    """
    answers, truth = torch.from_numpy(teacher_logits), torch.from_numpy(targets)

    def loss(logits: torch.Tensor, rows: torch.Tensor, inputs: Tensors = ()) -> torch.Tensor:
        soft, hard = (it[rows].to(logits.device) for it in (answers, truth))
        return _mixed(logits, soft, hard, temperature, weight)

    return loss


def view_labels(
    teacher: Classifier,
    targets: npt.NDArray[np.int64],
    *,
    temperature: float = 2.0,
    weight: float = 0.7,
) -> Loss:
    """`soft_labels` for rows of which each epoch shows another view: the teacher sees it too.

    Args:
        teacher: The fine-tuned teacher, on the device on which the student learns.
        targets: Labels of train, int64 (rows,).
        temperature, weight: As in `soft_labels`.
    """
    truth = torch.from_numpy(targets)
    teacher.eval()

    def loss(logits: torch.Tensor, rows: torch.Tensor, inputs: Tensors) -> torch.Tensor:
        with torch.no_grad():
            soft = teacher(*inputs).float()
        return _mixed(logits, soft, truth[rows].to(logits.device), temperature, weight)

    return loss


def _mixed(
    logits: torch.Tensor, soft: torch.Tensor, hard: torch.Tensor, temperature: float, weight: float
) -> torch.Tensor:
    """The two losses' sum, from the student's logits, the teacher's and the labels."""
    student = functional.log_softmax(logits / temperature, dim=1)
    teacher = functional.log_softmax(soft / temperature, dim=1)
    divergence = functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
    truth = functional.cross_entropy(logits, hard)
    return weight * temperature**2 * divergence + (1 - weight) * truth
