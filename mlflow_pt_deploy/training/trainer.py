"""Training loop: length-bucketed batches, linear schedule, best-epoch selection, checkpoints.

The loop is the same for all models. A teacher is trained with `cross_entropy`, a student with a
loss from `distillation`. Epochs are reported to a callback.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from mlflow_pt_deploy.data import Split, Splits
from mlflow_pt_deploy.errors import DataError, RowError, TrainingError
from mlflow_pt_deploy.models import Classifier
from mlflow_pt_deploy.system import interrupt
from mlflow_pt_deploy.system.device import is_out_of_memory, release_cached_memory
from mlflow_pt_deploy.system.progress import progress
from mlflow_pt_deploy.training.inference import Tensors, to_device
from mlflow_pt_deploy.training.optimization import Schedule
from mlflow_pt_deploy.training.process_group import ALONE, ProcessGroup
from mlflow_pt_deploy.training.training_state import Epoch, Loss, TrainingState


def cross_entropy(targets: npt.NDArray[np.int64]) -> Loss:
    """Return the cross-entropy loss against the labels, int64 (rows,)."""
    truth = torch.from_numpy(targets)

    def loss(logits: torch.Tensor, rows: torch.Tensor, inputs: Tensors = ()) -> torch.Tensor:
        return functional.cross_entropy(logits, to_device(truth[rows], logits.device))

    return loss


def check_fit(classifier: Classifier, splits: Splits) -> None:
    """Check before training that the classifier can read all rows.

    Raises:
        DataError: The model and the data have different columns (text, image), or an image is
            broken.
    """
    preprocessor = classifier.preprocessor
    if preprocessor.column != splits.column:
        raise DataError(
            f"the model reads a column `{preprocessor.column}`, and {splits.name} has "
            f"`{splits.column}`. Choose another teacher: minilm or any text classifier for texts, "
            "resnet or any image classifier for images."
        )
    if splits.column == "text":  # every text is valid
        return
    for name in ("train", "validation", "test"):
        for number, row in enumerate(getattr(splits, name).rows, start=1):
            interrupt.check()
            try:
                preprocessor.encode([row])
            except RowError as error:
                raise DataError(
                    f"{name}: `{splits.column}` {error.fault}, or remove the row (row {number}; "
                    "the first row after the header is 1)."
                ) from error


def fit(
    classifier: Classifier,
    splits: Splits,
    loss: Loss,
    schedule: Schedule,
    *,
    device: str = "cpu",
    checkpoint: Path | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
    group: ProcessGroup = ALONE,
) -> list[Epoch]:
    """Train a classifier in place and load the weights of its best epoch.

    The best epoch is the first one with the highest accuracy on validation.

    Args:
        classifier: The model to train.
        splits: Trains on `train` and selects the epoch on `validation`; `test` is not used.
        loss: Loss function, see `Loss`.
        schedule: Training hyperparameters.
        device: ``cpu``, ``cuda`` or, for one process, ``cuda:N``.
        checkpoint: Checkpoint file, written at least once a minute and after each epoch. If it
            exists, training resumes from it. It is removed at the end.
        on_epoch: Called after each epoch.
        group: The processes that train this model together; each calls this with the same
            arguments, and only process 0 reads and writes the checkpoint.

    Returns:
        All epochs, including those before an interruption.

    Raises:
        DataError: The loss is not finite, or the checkpoint was made with other hyperparameters.
        TrainingError: The processes have other rows, a batch has too few for all of them, or the
            GPU has no memory for one.
    """
    schedule = schedule.resolved(classifier)
    if group.size > 1:
        group.check_same(splits.train.digest)
    checkpoint = checkpoint if group.rank == 0 else None
    saved = checkpoint.read_bytes() if checkpoint and checkpoint.exists() else b""
    with _memory_error_explained(schedule.batch_size, device):
        run = TrainingState(classifier.to(device), splits.train, schedule, device, group)
        if saved := group.broadcast(saved):
            run.restore(saved)
        _run(run, loss, splits.validation, checkpoint, on_epoch)
    classifier.load_state_dict(run.best)
    classifier.to("cpu").eval()
    if checkpoint:
        checkpoint.unlink(missing_ok=True)
    return run.epochs


@contextmanager
def _memory_error_explained(batch_size: int, device: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        release_cached_memory()
        raise TrainingError(
            f"{device} has no memory for a training step with --batch-size {batch_size}. Give a "
            "smaller --batch-size and start again; or free its memory, or give more --processes, "
            "which share a batch, and continue with --resume."
        ) from error


def _run(
    run: TrainingState,
    loss: Loss,
    validation: Split,
    checkpoint: Path | None,
    on_epoch: Callable[[Epoch], None] | None,
) -> None:
    """Run the epochs that are left."""
    shown = run.group.rank == 0
    with progress("training", run.total_steps, "batches", done=run.step, shown=shown) as bar:
        while len(run.epochs) < run.schedule.epochs:
            epoch = run.next_epoch(loss, validation, checkpoint, bar)
            bar.update(
                0, f"loss {epoch.train_loss:.3f}, validation {epoch.validation_accuracy:.4f}"
            )
            if checkpoint:
                run.save(checkpoint)
            if on_epoch:
                on_epoch(epoch)
