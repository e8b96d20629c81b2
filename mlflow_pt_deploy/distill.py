"""What a student starts from, what it is taught, and the loss that teaches it.

Soft labels with temperature follow Hinton, Vinyals & Dean (2015); starting from the teacher's own
layers follows DistilBERT (Sanh et al. 2019); answering each view of an image anew follows Beyer et
al. (2022); the relation loss is that of similarity-preserving distillation (Tung & Mori 2019).
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

from mlflow_pt_deploy import interrupt
from mlflow_pt_deploy.augment import make_texts
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
from mlflow_pt_deploy.preprocess import Row
from mlflow_pt_deploy.progress import progress
from mlflow_pt_deploy.train import Loss, Tensors, predict_batches


@dataclass(frozen=True)
class Lesson:
    """What a teacher says of rows.

    Attributes:
        split: The rows. Those that were made have the teacher's label.
        logits: Its answers, float32 (rows, classes).
        features: What its last layer makes them from, float16 (rows, width).
    """

    split: Split
    logits: npt.NDArray[np.float32]
    features: npt.NDArray[np.float16]


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


def kept_layers(depth: int, keep: int, chosen: str = "") -> tuple[int, ...]:
    """Which of the teacher's layers a student starts from.

    Args:
        depth: Layers of the teacher.
        keep: How many, evenly spread, where none are chosen.
        chosen: Their numbers from 0 on, rising, separated by commas; empty: `spread`.

    Raises:
        ModelError: `keep` or a number is out of range, or they do not rise.
    """
    if not chosen:
        return spread(depth, keep)
    words = [word.strip() for word in chosen.split(",")]
    numbers = tuple(int(word) for word in words if word.isdecimal())
    in_range = len(numbers) == len(words) and max(numbers, default=depth) < depth
    if not in_range or sorted(set(numbers)) != list(numbers):
        raise ModelError(
            f"keep_layers is {chosen!r}; give numbers from 0 to {depth - 1}, rising, separated by "
            "commas, e.g. 0,2,5."
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
    """What learns from a teacher.

    Args:
        teacher: Of texts: the student has its embeddings, its head and some of its layers. Of
            images: the student is a MobileNetV2 from scratch.
        layers: How many layers of a teacher of texts, evenly spread; 0: a static student.
        chosen: Which of its layers instead, see `kept_layers`.
        width: Share of MobileNetV2's channels.
        rows: Of train: a static student knows their word pieces from the start.
        frequent: See `new_static`.

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
        return new_static(teacher, cast(Sequence[str], rows), frequent=frequent)
    return shrink(teacher, kept_layers(teacher.network.config.num_hidden_layers, layers, chosen))


def teach(
    teacher: Classifier,
    train: Split,
    cache: Path,
    *,
    made: float = 0.0,
    seed: int = 0,
    device: str = "cpu",
) -> Lesson:
    """Let the teacher label train, and texts made from it; computed once.

    Args:
        teacher: The fine-tuned teacher.
        train: The rows that it labels.
        cache: Folder for files that carry the digest of these weights and rows in their names.
        made: Texts to make, as a multiple of train's rows, see `augment.make_texts`.
        seed: Of the texts that are made.
        device: ``cpu`` or ``cuda``.
    """
    known = _labelled(teacher, train, cache, device)
    if not made:
        return known
    rows = cast(Sequence[str], train.rows)
    texts = make_texts(rows, round(made * len(train)), seed=seed)
    unlabelled = Split(texts, np.zeros(len(texts), dtype=np.int64))
    new = _labelled(teacher, unlabelled, cache, device)
    targets = np.concatenate([train.targets, new.logits.argmax(1)])
    return Lesson(
        Split(train.rows + texts, targets),
        np.concatenate([known.logits, new.logits]),
        np.concatenate([known.features, new.features]),
    )


def _labelled(teacher: Classifier, split: Split, cache: Path, device: str) -> Lesson:
    path = cache / f"{_digest(teacher)}-{split.digest}.npz"
    if path.exists():
        with np.load(path, allow_pickle=False) as kept:
            return Lesson(split, kept["logits"], kept["features"])
    caught = _Caught(teacher)
    logits = np.empty((len(split), len(teacher.labels)), dtype=np.float32)
    features = np.empty((len(split), caught.width), dtype=np.float16)
    batches = predict_batches(teacher, split.rows, device=device)
    with progress("teaching", len(split), "rows") as shown:
        for chosen, found in batches:
            logits[chosen], features[chosen] = found.cpu(), caught.take().cpu()
            shown.update(len(chosen))
    caught.end()
    cache.mkdir(parents=True, exist_ok=True)
    side = path.with_suffix(f".{os.getpid()}")
    with interrupt.shielded():
        with side.open("wb") as file:
            np.savez(file, logits=logits, features=features)
        os.replace(side, path)
    return Lesson(split, logits, features)


class _Caught:
    """What goes into a classifier's last layer, as it goes in."""

    def __init__(self, classifier: Classifier) -> None:
        linears = [m for m in classifier.network.modules() if isinstance(m, nn.Linear)]
        self._now: torch.Tensor | None = None
        self.width = linears[-1].in_features
        self._hook = linears[-1].register_forward_pre_hook(self._keep)

    def _keep(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._now = inputs[0].flatten(1)

    def take(self) -> torch.Tensor:
        """Of the last batch, (rows, width)."""
        assert self._now is not None  # asked after a forward pass only
        return self._now

    def end(self) -> None:
        self._hook.remove()


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


def with_relations(
    loss: Loss, student: Classifier, features: npt.NDArray[np.float16], weight: float
) -> Loss:
    """Besides, let rows be alike to the student that are alike to the teacher.

    The mean squared difference of the two matrices of cosines among a batch's rows, of what goes
    into the last layers. The widths may differ, so any student can learn from any teacher.

    Args:
        loss: What this is added to.
        student: The student that will be trained.
        features: The teacher's on train, float16 (rows, width).
        weight: Of the addition; 0 leaves `loss` as it is.
    """
    if not weight:
        return loss
    caught, known = _Caught(student), torch.from_numpy(features)

    def both(logits: torch.Tensor, rows: torch.Tensor, inputs: Tensors = ()) -> torch.Tensor:
        ours = _cosines(caught.take().float())
        theirs = _cosines(known[rows].float().to(ours.device))
        return loss(logits, rows, inputs) + weight * functional.mse_loss(ours, theirs)

    return both


def _cosines(features: torch.Tensor) -> torch.Tensor:
    unit = functional.normalize(features, dim=1)
    return unit @ unit.T
