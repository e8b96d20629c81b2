"""Training loop: length-bucketed batches, linear schedule, best-epoch selection, checkpoints.

The loop is the same for all models. A teacher is trained with `cross_entropy`, a student with a
loss from `distillation`. Epochs are reported to a callback.
"""

from __future__ import annotations

import contextlib
import io
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from mlflow_pt_deploy.data import Split, Splits
from mlflow_pt_deploy.errors import DataError, RowError
from mlflow_pt_deploy.model_types import STATIC
from mlflow_pt_deploy.models import Classifier
from mlflow_pt_deploy.preprocessing import Row
from mlflow_pt_deploy.system import interrupt
from mlflow_pt_deploy.system.hardware import cpu_flags
from mlflow_pt_deploy.system.progress import Progress, progress
from mlflow_pt_deploy.training.process_group import ProcessGroup, check_shares

Tensors = tuple[torch.Tensor, ...]
Loss = Callable[[torch.Tensor, torch.Tensor, Tensors], torch.Tensor]
"""Maps logits (batch, classes), the row indices in train, int64 (batch,), and the model inputs to a
scalar loss."""

_CHECKPOINT_EVERY_S = 60.0
_ALONE = ProcessGroup()
_MAX_ENCODED_BYTES = 2e9  # larger image sets are encoded batch by batch


@dataclass(frozen=True)
class Schedule:
    """Training hyperparameters.

    Attributes:
        epochs: Passes over train.
        learning_rate: Peak learning rate; 0 selects a default, see `resolved`.
        batch_size: Rows per step; 0 selects a default.
        warmup: Share of the steps in which the learning rate rises, 0 to 1.
        weight_decay: Weight decay of AdamW.
        seed: Random seed of the row order and of dropout.
    """

    epochs: int = 5
    learning_rate: float = 0.0
    batch_size: int = 0
    warmup: float = 0.1
    weight_decay: float = 0.01
    seed: int = 0

    def resolved(self, classifier: Classifier) -> Schedule:
        """Return the schedule with defaults filled in.

        Rows per step: 32; static students 128, networks from scratch 64. Peak learning rate: 2e-4
        for encoders with a hidden size up to 512 and 5e-5 above; 2e-3 for static students, 1e-3 for
        networks from scratch.
        """
        config = classifier.network.config
        if config.model_type == STATIC:
            rows, peak = 128, 2e-3
        elif not classifier.pretrained:
            rows, peak = 64, 1e-3
        else:
            rows, peak = 32, 2e-4 if getattr(config, "hidden_size", 768) <= 512 else 5e-5
        return replace(
            self,
            batch_size=self.batch_size or rows,
            learning_rate=self.learning_rate or peak,
        )


@dataclass(frozen=True)
class Epoch:
    """Result of one epoch: mean loss on train, accuracy on validation, duration in seconds."""

    number: int
    train_loss: float
    validation_accuracy: float
    seconds: float


def cross_entropy(targets: npt.NDArray[np.int64]) -> Loss:
    """Return the cross-entropy loss against the labels, int64 (rows,)."""
    truth = torch.from_numpy(targets)

    def loss(logits: torch.Tensor, rows: torch.Tensor, inputs: Tensors = ()) -> torch.Tensor:
        return functional.cross_entropy(logits, truth[rows].to(logits.device))

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
    group: ProcessGroup = _ALONE,
) -> list[Epoch]:
    """Train a classifier in place and load the weights of its best epoch.

    The best epoch is the first one with the highest accuracy on validation.

    Args:
        classifier: The model to train.
        splits: Trains on `train` and selects the epoch on `validation`; `test` is not used.
        loss: Loss function, see `Loss`.
        schedule: Training hyperparameters.
        device: ``cpu`` or ``cuda``.
        checkpoint: Checkpoint file, written at least once a minute and after each epoch. If it
            exists, training resumes from it. It is removed at the end.
        on_epoch: Called after each epoch.
        group: The processes that train this model together; each calls this with the same
            arguments, and only process 0 reads and writes the checkpoint.

    Returns:
        All epochs, including those before an interruption.

    Raises:
        DataError: The loss is not finite, or the checkpoint was made with other hyperparameters.
        TrainingError: The processes have other rows, or a batch has too few for all of them.
    """
    schedule = schedule.resolved(classifier)
    if group.size > 1:
        group.check_same(splits.train.digest)
    checkpoint = checkpoint if group.rank == 0 else None
    saved = checkpoint.read_bytes() if checkpoint and checkpoint.exists() else b""
    run = _TrainingState(classifier.to(device), splits.train, schedule, device, group)
    if saved := group.broadcast(saved):
        run.restore(saved)
    shown = group.rank == 0
    with progress("training", run.total_steps, "batches", done=run.step, shown=shown) as bar:
        while len(run.epochs) < schedule.epochs:
            epoch = run.next_epoch(loss, splits.validation, checkpoint, bar)
            bar.update(
                0, f"loss {epoch.train_loss:.3f}, validation {epoch.validation_accuracy:.4f}"
            )
            if checkpoint:
                run.save(checkpoint)
            if on_epoch:
                on_epoch(epoch)
    classifier.load_state_dict(run.best)
    classifier.to("cpu").eval()
    if checkpoint:
        checkpoint.unlink(missing_ok=True)
    return run.epochs


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
                inputs = _tensors(classifier, [encoded[row] for row in indices], device)
                yield np.add(indices, start), classifier(*inputs)


def evaluate(
    classifier: Classifier, split: Split, *, device: str = "cpu", group: ProcessGroup = _ALONE
) -> float:
    """Return the accuracy, 0 to 1; each process of the group predicts a part of the rows."""
    part = slice(group.rank, None, group.size)
    logits = predict_logits(classifier, split.rows[part], device=device)
    correct = (logits.argmax(axis=1) == split.targets[part]).sum()
    return group.sum(float(correct)) / len(split)


class _TrainingState:
    """State of a training run; `save` and `restore` cover all of it."""

    def __init__(
        self,
        classifier: Classifier,
        train: Split,
        schedule: Schedule,
        device: str,
        group: ProcessGroup,
    ) -> None:
        self.classifier = classifier
        self.group = group
        self.schedule = schedule
        self.device = device
        self.rows = train.rows
        self.encoded = self._encode_all()
        self.allows_single_row = not any(
            isinstance(module, nn.modules.batchnorm._BatchNorm) for module in classifier.modules()
        )
        self.least = 1 if self.allows_single_row else 2
        check_shares(group.size, schedule.batch_size, least=self.least)
        self.model = group.wrap(
            classifier, _tensors(classifier, self._encode(np.arange(1)), device)
        )
        self.steps_per_epoch = -(-len(train) // schedule.batch_size)
        self.total_steps = self.steps_per_epoch * schedule.epochs
        self.step = 0
        self.losses: list[float] = []
        self.epochs: list[Epoch] = []
        self.best: dict[str, torch.Tensor] = {}
        self.optimizers = _optimizers(classifier, schedule)
        warm = max(1, int(schedule.warmup * self.total_steps))
        rest = max(1, self.total_steps - warm)
        self.schedulers = [
            torch.optim.lr_scheduler.LambdaLR(
                optimizer,
                lambda step: min((step + 1) / warm, max(0.0, (self.total_steps - step) / rest)),
            )
            for optimizer in self.optimizers
        ]
        torch.manual_seed(schedule.seed)

    def next_epoch(
        self, loss: Loss, validation: Split, checkpoint: Path | None, bar: Progress
    ) -> Epoch:
        """Train for one epoch and evaluate it."""
        started = time.monotonic()
        try:
            self.run_epoch(loss, checkpoint, bar)
            self.group.share_buffers(self.classifier)
            accuracy = evaluate(self.classifier, validation, device=self.device, group=self.group)
        except RuntimeError:  # another process has ended, perhaps by the same signal
            if checkpoint and interrupt.requested():
                self.save(checkpoint)
            interrupt.check()
            raise
        seconds = time.monotonic() - started
        epoch = Epoch(len(self.epochs) + 1, self.mean_loss(), accuracy, seconds)
        self.finish_epoch(epoch)
        return epoch

    def run_epoch(self, loss: Loss, checkpoint: Path | None, bar: Progress) -> None:
        """Run the remaining steps of the current epoch."""
        self.model.train()
        batches = self._batches(len(self.epochs))
        saved_at = time.monotonic()
        for rows in batches[self.step - len(self.epochs) * self.steps_per_epoch :]:
            self.losses.append(self._train_step(loss, rows))
            self.step += 1
            bar.update()
            due = time.monotonic() - saved_at > _CHECKPOINT_EVERY_S
            if checkpoint and (due or interrupt.requested()):
                self.save(checkpoint)
                saved_at = time.monotonic()
            interrupt.check()

    def mean_loss(self) -> float:
        return float(np.mean(self.losses))

    def finish_epoch(self, epoch: Epoch) -> None:
        best = max((e.validation_accuracy for e in self.epochs), default=-1.0)
        self.epochs.append(epoch)
        self.losses = []
        if epoch.validation_accuracy > best:
            state = self.classifier.state_dict()
            self.best = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".partial")
        with interrupt.shielded():
            torch.save(self._state(), temporary)
            os.replace(temporary, path)

    def _state(self) -> dict[str, Any]:
        return {
            "schedule": asdict(self.schedule),
            "classifier": self.classifier.state_dict(),
            "optimizers": [each.state_dict() for each in self.optimizers],
            "schedulers": [each.state_dict() for each in self.schedulers],
            "random": torch.get_rng_state(),
            "step": self.step,
            "losses": self.losses,
            "epochs": [asdict(epoch) for epoch in self.epochs],
            "best": self.best,
        }

    def restore(self, content: bytes) -> None:
        saved = torch.load(io.BytesIO(content), weights_only=True, map_location=self.device)
        if saved["schedule"] != asdict(self.schedule):
            raise DataError(
                f"the checkpoint was made with {saved['schedule']}, and this run has "
                f"{asdict(self.schedule)}. Resume with the same options, or start a new run."
            )
        self.classifier.load_state_dict(saved["classifier"])
        for name in ("optimizers", "schedulers"):
            for each, state in zip(getattr(self, name), saved[name], strict=True):
                each.load_state_dict(state)
        torch.set_rng_state(saved["random"].cpu())
        self.step, self.losses, self.best = saved["step"], saved["losses"], saved["best"]
        self.epochs = [Epoch(**epoch) for epoch in saved["epochs"]]

    def _train_step(self, loss: Loss, rows: npt.NDArray[np.int64]) -> float:
        # Seeded by the step: a resumed run repeats what an uninterrupted run would do.
        random = np.random.default_rng((self.schedule.seed, self.step, self.group.rank))
        if self.group.size > 1:  # dropout differs between the processes
            torch.manual_seed(int(random.integers(2**62)))
        rows, weight = self.group.share(rows, self.least)
        augmented = self.classifier.augment(self._encode(rows), random)
        inputs = _tensors(self.classifier, augmented, self.device)
        with _precision(self.device):
            logits = self.model(*inputs)
            value = weight * loss(logits.float(), torch.from_numpy(rows), inputs)
        value.backward()
        # Before the step: where another process has ended, the weights are still those of the last.
        number = self.group.sum(value.item()) / self.group.size
        if not np.isfinite(number):
            raise DataError("the training loss is not a number; try a lower --learning-rate.")
        _clip_gradients(self.classifier, 1.0)
        for optimizer, scheduler in zip(self.optimizers, self.schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
        return number

    def _encode_all(self) -> Sequence[Any] | None:
        """Encode all rows; None if they need too much memory and each step encodes its own."""
        encode = self.classifier.preprocessor.encode
        (first,) = encode(self.rows[:1])
        if getattr(first, "nbytes", 0) * len(self.rows) > _MAX_ENCODED_BYTES:
            return None
        return encode(self.rows)

    def _encode(self, rows: npt.NDArray[np.int64]) -> Sequence[Any]:
        if self.encoded is None:
            return self.classifier.preprocessor.encode([self.rows[row] for row in rows])
        return [self.encoded[row] for row in rows]

    def _batches(self, epoch: int) -> list[npt.NDArray[np.int64]]:
        """Random batches of rows of similar length, in a different order each epoch."""
        random = np.random.default_rng((self.schedule.seed, epoch))
        lengths = np.asarray([len(row) for row in self.encoded or [()] * len(self.rows)])
        noisy = lengths * random.uniform(0.8, 1.25, len(lengths))
        order = np.argsort(noisy, kind="stable")
        size = self.schedule.batch_size
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        if len(batches[-1]) == 1 and not self.allows_single_row:
            batches[-1] = np.append(batches[-1], order[0])  # batch norm needs more than one row
        return [batches[index] for index in random.permutation(len(batches))]


def _optimizers(classifier: Classifier, schedule: Schedule) -> list[torch.optim.Optimizer]:
    """AdamW for dense parameters, SparseAdam for embeddings with sparse gradients."""
    tables = [
        module.weight
        for module in classifier.modules()
        if isinstance(module, nn.Embedding) and module.sparse
    ]
    sparse = {id(table) for table in tables}
    dense = [each for each in classifier.parameters() if id(each) not in sparse]
    rate = schedule.learning_rate
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(dense, lr=rate, weight_decay=schedule.weight_decay, fused=True)
    ]
    if tables:
        optimizers.append(torch.optim.SparseAdam(tables, lr=rate))
    return optimizers


def _clip_gradients(classifier: Classifier, max_norm: float) -> None:
    """Clip like `torch.nn.utils.clip_grad_norm_`, with support for sparse gradients."""
    values = []
    for parameter in classifier.parameters():
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()  # sums the entries of a row
            values.append(parameter.grad.values())
        elif parameter.grad is not None:
            values.append(parameter.grad)
    scale = (max_norm / (torch.nn.utils.get_total_norm(values) + 1e-6)).clamp(max=1.0)
    for each in values:
        each.mul_(scale)


def _tensors(classifier: Classifier, encoded: Sequence[Any], device: str) -> Tensors:
    inputs = classifier.preprocessor.collate(encoded)
    return tuple(torch.from_numpy(array).to(device) for array in inputs.values())


def _precision(device: str) -> contextlib.AbstractContextManager[object]:
    """Use bf16 autocast where it is faster, otherwise fp32.

    With avx512_bf16 alone the conversion of fp32 weights at each step costs more than it saves:
    MiniLM takes 400 ms per step with it and 290 ms without (Xeon).
    """
    if device == "cuda" or "amx_bf16" in cpu_flags():
        return torch.autocast(device, dtype=torch.bfloat16)
    return contextlib.nullcontext()
