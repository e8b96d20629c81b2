"""Logits and accuracy of a classifier, in batches of rows of similar length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mlflow_pt_deploy.data import Split
from mlflow_pt_deploy.errors import TrainingError
from mlflow_pt_deploy.models import Classifier
from mlflow_pt_deploy.preprocessing import Row
from mlflow_pt_deploy.system import interrupt
from mlflow_pt_deploy.system.device import (
    CPU,
    CUDA,
    disable_tf32,
    is_out_of_memory,
    kind_of,
    release_cached_memory,
)
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
    describes the model that is saved. A batch for which a GPU has no memory is halved.

    Raises:
        TrainingError: The GPU has no memory for one row.
    """
    classifier.to(device).eval()
    if kind_of(device) == CUDA:
        disable_tf32()
    size = classifier.preprocessor.slice_rows
    with torch.inference_mode():
        for start in range(0, len(rows), size):
            encoded = classifier.preprocessor.encode(rows[start : start + size])
            order = sorted(range(len(encoded)), key=lambda row: len(encoded[row]))
            for first in range(0, len(order), batch_size):
                interrupt.check()
                batch = order[first : first + batch_size]
                for indices, logits in _predict_parts(classifier, encoded, batch, device):
                    yield np.add(indices, start), logits


def _predict_parts(
    classifier: Classifier, encoded: Sequence[Any], batch: list[int], device: str
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Yield the rows of a batch and their logits: at once, or in halves where memory is short."""
    try:
        logits = classifier(*to_tensors(classifier, [encoded[row] for row in batch], device))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        if len(batch) == 1:
            raise TrainingError(
                f"{device} has no memory for the model and one row. Free its memory, or give "
                "--device cpu."
            ) from error
        logits = None
    if logits is not None:
        yield batch, logits
        return
    release_cached_memory()  # not in the handler: the error still holds what the batch computed
    half = len(batch) // 2
    for part in (batch[:half], batch[half:]):
        yield from _predict_parts(classifier, encoded, part, device)


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
    return tuple(to_device(torch.from_numpy(array), device) for array in inputs.values())


def to_device(tensor: torch.Tensor, device: str | torch.device) -> torch.Tensor:
    """Copy a tensor of the CPU; to a GPU by pinned memory, so that the caller does not wait."""
    if kind_of(str(device)) == CPU:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
