"""Logits and accuracy of a classifier, in batches of rows of similar length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mlflow_pt_deploy.data import Split
from mlflow_pt_deploy.models import Classifier
from mlflow_pt_deploy.preprocessing import Row
from mlflow_pt_deploy.system import interrupt
from mlflow_pt_deploy.training.process_group import ALONE, ProcessGroup

Tensors = tuple[torch.Tensor, ...]


def predict_logits(
    classifier: Classifier, rows: Sequence[Row], *, device: str = "cpu", batch_size: int = 64
) -> npt.NDArray[np.float32]:
    """Predict the logits of all rows in order, float32 (rows, classes).

    Raises:
        RowError: A row cannot be read.
    """
    logits = np.empty((len(rows), len(classifier.labels)), dtype=np.float32)
    batches = predict_batches(classifier, rows, device=device, batch_size=batch_size)
    for indices, batch_logits in batches:
        logits[indices] = batch_logits.cpu()
    return logits


def predict_batches(
    classifier: Classifier, rows: Sequence[Row], *, device: str = "cpu", batch_size: int = 64
) -> Iterator[tuple[npt.NDArray[np.int64], torch.Tensor]]:
    """Yield row indices, int64 (batch,), and logits (batch, classes); rows of similar length share
    a batch.

    Computes in the precision of the weights even where `fit` uses bf16, so that an evaluation
    describes the model that is saved.
    """
    classifier.to(device).eval()
    size = classifier.preprocessor.slice_rows
    with torch.inference_mode():
        for start in range(0, len(rows), size):
            encoded = classifier.preprocessor.encode(rows[start : start + size])
            order = sorted(range(len(encoded)), key=lambda row: len(encoded[row]))
            for first in range(0, len(order), batch_size):
                interrupt.check()
                indices = order[first : first + batch_size]
                inputs = to_tensors(classifier, [encoded[row] for row in indices], device)
                yield np.add(indices, start), classifier(*inputs)


def evaluate(
    classifier: Classifier, split: Split, *, device: str = "cpu", group: ProcessGroup = ALONE
) -> float:
    """Return the accuracy, 0 to 1; each process of the group predicts a part of the rows."""
    part = slice(group.rank, None, group.size)
    logits = predict_logits(classifier, split.rows[part], device=device)
    correct = (logits.argmax(axis=1) == split.targets[part]).sum()
    return group.sum(float(correct)) / len(split)


def to_tensors(classifier: Classifier, encoded: Sequence[Any], device: str) -> Tensors:
    """The model's inputs for encoded rows, batch first, on a device."""
    inputs = classifier.preprocessor.collate(encoded)
    return tuple(torch.from_numpy(array).to(device) for array in inputs.values())
