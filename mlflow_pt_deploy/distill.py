"""What a student starts from, and the loss that teaches it.

Soft labels with temperature follow Hinton, Vinyals & Dean (2015); starting from the teacher's own
layers follows DistilBERT (Sanh et al. 2019).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from mlflow_pt_deploy.errors import ModelError
from mlflow_pt_deploy.models import Classifier, shrink
from mlflow_pt_deploy.train import Loss


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


def start_student(teacher: Classifier, layers: int) -> Classifier:
    """A student with the teacher's embeddings, head and `layers` of its layers."""
    return shrink(teacher, spread(teacher.network.config.num_hidden_layers, layers))


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
    soft = functional.log_softmax(torch.from_numpy(teacher_logits) / temperature, dim=1)
    truth = torch.from_numpy(targets)

    def loss(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        student = functional.log_softmax(logits / temperature, dim=1)
        teacher = soft[rows].to(logits.device)
        divergence = functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
        hard = functional.cross_entropy(logits, truth[rows].to(logits.device))
        return weight * temperature**2 * divergence + (1 - weight) * hard

    return loss
