"""The one fit loop: batches of like lengths, a linear schedule, the best epoch kept, resumable.

A teacher learns with `cross_entropy`; a student with a loss of `distill`. The loop does not know
which it trains, and knows nothing of MLflow: it reports epochs to a callback.
"""

from __future__ import annotations

import contextlib
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

from mlflow_pt_deploy import interrupt
from mlflow_pt_deploy.data import Split, Splits
from mlflow_pt_deploy.errors import DataError, RowError
from mlflow_pt_deploy.hardware import cpu_flags
from mlflow_pt_deploy.models import Classifier
from mlflow_pt_deploy.preprocess import Row
from mlflow_pt_deploy.progress import Progress, progress
from mlflow_pt_deploy.variants.numpy import STATIC

Tensors = tuple[torch.Tensor, ...]
Loss = Callable[[torch.Tensor, torch.Tensor, Tensors], torch.Tensor]
"""Logits (batch, classes), the rows' indices in train, int64 (batch,), and the inputs that gave
these logits, to a scalar."""

_CHECKPOINT_EVERY_S = 60.0
_MOST_BYTES = 2e9  # of pixels


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to learn.

    Attributes:
        epochs: Passes over train.
        learning_rate: Peak; 0 chooses, see `resolved`.
        batch_size: Rows a step; 0 chooses.
        warmup: Share of the steps in which the learning rate rises.
        weight_decay: Of AdamW.
        seed: Of the order of rows and of dropout.
    """

    epochs: int = 5
    learning_rate: float = 0.0
    batch_size: int = 0
    warmup: float = 0.1
    weight_decay: float = 0.01
    seed: int = 0

    def resolved(self, classifier: Classifier) -> Schedule:
        """The same with numbers for what was left to choose.

        Rows a step: 32; static students 128, networks from scratch 64. Peak: 2e-4 for encoders up
        to 512 wide and 5e-5 above; 2e-3 for static students, 1e-3 for networks from scratch.
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
    """What one epoch gave: mean loss on train, accuracy on validation, seconds it took."""

    number: int
    train_loss: float
    validation_accuracy: float
    seconds: float


def cross_entropy(targets: npt.NDArray[np.int64]) -> Loss:
    """The loss of a teacher: cross entropy against the labels."""
    truth = torch.from_numpy(targets)

    def loss(logits: torch.Tensor, rows: torch.Tensor, inputs: Tensors = ()) -> torch.Tensor:
        return functional.cross_entropy(logits, truth[rows].to(logits.device))

    return loss


def check_fit(classifier: Classifier, splits: Splits) -> None:
    """Refuse data that the classifier cannot read, before a long run stumbles over it.

    Raises:
        DataError: The one reads texts and the other holds images; or an image is broken.
    """
    preprocessor = classifier.preprocessor
    if preprocessor.column != splits.column:
        raise DataError(
            f"the model reads a column `{preprocessor.column}`, and {splits.name} has "
            f"`{splits.column}`. Choose another teacher: minilm or any classifier of texts for "
            "texts, resnet or any classifier of images for images."
        )
    if splits.column == "text":  # every text can be read
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
) -> list[Epoch]:
    """Train in place, and leave the classifier with the weights of its best epoch.

    The best epoch is the one with the highest accuracy on validation.

    Args:
        classifier: The model to train.
        splits: `train` teaches and `validation` decides; `test` is not looked at.
        loss: See `Loss`.
        schedule: How long and how fast.
        device: ``cpu`` or ``cuda``.
        checkpoint: File to save progress to, at least once a minute and after each epoch. If it
            exists, training goes on from there; it is removed at the end.
        on_epoch: Called after each epoch.

    Returns:
        All epochs, those before an interruption included.

    Raises:
        DataError: The loss is not a number: the learning rate is too high, or the data broken.
    """
    schedule = schedule.resolved(classifier)
    run = _Run(classifier.to(device), splits.train, schedule, device)
    if checkpoint and checkpoint.exists():
        run.restore(checkpoint)
    with progress("training", run.total_steps, "batches", done=run.step) as shown:
        while len(run.epochs) < schedule.epochs:
            started = time.monotonic()
            run.one_epoch(loss, checkpoint, shown)
            accuracy = evaluate(classifier, splits.validation, device=device)
            epoch = Epoch(
                len(run.epochs) + 1, run.mean_loss(), accuracy, time.monotonic() - started
            )
            run.finish(epoch)
            shown.update(0, f"loss {epoch.train_loss:.3f}, validation {accuracy:.4f}")
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
    """Logits of all rows in their order, float32 (rows, classes).

    Raises:
        RowError: A row cannot be read.
    """
    logits = np.empty((len(rows), len(classifier.labels)), dtype=np.float32)
    for chosen, found in predict_batches(classifier, rows, device=device, batch_size=batch_size):
        logits[chosen] = found.cpu()
    return logits


def predict_batches(
    classifier: Classifier, rows: Sequence[Row], *, device: str = "cpu", batch_size: int = 64
) -> Iterator[tuple[npt.NDArray[np.int64], torch.Tensor]]:
    """Logits of all rows, rows of like length together: their places, and (places, classes).

    In the precision of the weights, also where `fit` computes in less: what is said of a model is
    said of the model that is saved.
    """
    classifier.to(device).eval()
    size = classifier.preprocessor.slice_rows
    with torch.inference_mode():
        for start in range(0, len(rows), size):
            encoded = classifier.preprocessor.encode(rows[start : start + size])
            order = sorted(range(len(encoded)), key=lambda row: len(encoded[row]))
            for first in range(0, len(order), batch_size):
                interrupt.check()
                chosen = order[first : first + batch_size]
                inputs = _tensors(classifier, [encoded[row] for row in chosen], device)
                yield np.add(chosen, start), classifier(*inputs)


def evaluate(classifier: Classifier, split: Split, *, device: str = "cpu") -> float:
    """Share of rows whose label the classifier finds."""
    logits = predict_logits(classifier, split.rows, device=device)
    return float((logits.argmax(axis=1) == split.targets).mean())


class _Run:
    """Everything about a training that a checkpoint must hold."""

    def __init__(
        self, classifier: Classifier, train: Split, schedule: Schedule, device: str
    ) -> None:
        self.classifier = classifier
        self.schedule = schedule
        self.device = device
        self.rows = train.rows
        self.encoded = self._all_encoded()
        self.lone_rows = not any(
            isinstance(module, nn.modules.batchnorm._BatchNorm) for module in classifier.modules()
        )
        self.steps_an_epoch = -(-len(train) // schedule.batch_size)
        self.total_steps = self.steps_an_epoch * schedule.epochs
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

    def one_epoch(self, loss: Loss, checkpoint: Path | None, shown: Progress) -> None:
        """The rest of the current epoch."""
        self.classifier.train()
        batches = self._batches(len(self.epochs))
        saved = time.monotonic()
        for chosen in batches[self.step - len(self.epochs) * self.steps_an_epoch :]:
            self.losses.append(self._learn(loss, chosen))
            self.step += 1
            shown.update()
            late = time.monotonic() - saved > _CHECKPOINT_EVERY_S
            if checkpoint and (late or interrupt.requested()):
                self.save(checkpoint)
                saved = time.monotonic()
            interrupt.check()

    def mean_loss(self) -> float:
        return float(np.mean(self.losses))

    def finish(self, epoch: Epoch) -> None:
        best = max((e.validation_accuracy for e in self.epochs), default=-1.0)
        self.epochs.append(epoch)
        self.losses = []
        if epoch.validation_accuracy > best:
            state = self.classifier.state_dict()
            self.best = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        side = path.with_suffix(".partial")
        with interrupt.shielded():
            torch.save(self._state(), side)
            os.replace(side, path)

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

    def restore(self, path: Path) -> None:
        saved = torch.load(path, weights_only=True, map_location=self.device)
        if saved["schedule"] != asdict(self.schedule):
            raise DataError(
                f"the checkpoint was made with {saved['schedule']}, asked is "
                f"{asdict(self.schedule)}. Resume with the same options, or start a new run."
            )
        self.classifier.load_state_dict(saved["classifier"])
        for name in ("optimizers", "schedulers"):
            for each, state in zip(getattr(self, name), saved[name], strict=True):
                each.load_state_dict(state)
        torch.set_rng_state(saved["random"].cpu())
        self.step, self.losses, self.best = saved["step"], saved["losses"], saved["best"]
        self.epochs = [Epoch(**epoch) for epoch in saved["epochs"]]

    def _learn(self, loss: Loss, chosen: npt.NDArray[np.int64]) -> float:
        # Seeded by the step, so that a resumed training sees what an uninterrupted one would.
        random = np.random.default_rng((self.schedule.seed, self.step))
        shown = self.classifier.vary(self._encoded(chosen), random)
        inputs = _tensors(self.classifier, shown, self.device)
        with _precision(self.device):
            logits = self.classifier(*inputs)
            value = loss(logits.float(), torch.from_numpy(chosen), inputs)
        value.backward()
        _clip(self.classifier, 1.0)
        for optimizer, scheduler in zip(self.optimizers, self.schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
        if not np.isfinite(number := value.item()):
            raise DataError("the training loss is not a number; try a lower --learning-rate.")
        return number

    def _all_encoded(self) -> Sequence[Any] | None:
        """All rows, or None for more pixels than should be held; then each step reads its own."""
        encode = self.classifier.preprocessor.encode
        (first,) = encode(self.rows[:1])
        if getattr(first, "nbytes", 0) * len(self.rows) > _MOST_BYTES:
            return None
        return encode(self.rows)

    def _encoded(self, chosen: npt.NDArray[np.int64]) -> Sequence[Any]:
        if self.encoded is None:
            return self.classifier.preprocessor.encode([self.rows[row] for row in chosen])
        return [self.encoded[row] for row in chosen]

    def _batches(self, epoch: int) -> list[npt.NDArray[np.int64]]:
        """Random batches of rows of similar length: little padding, another order each epoch."""
        random = np.random.default_rng((self.schedule.seed, epoch))
        lengths = np.asarray([len(row) for row in self.encoded or [()] * len(self.rows)])
        noisy = lengths * random.uniform(0.8, 1.25, len(lengths))
        order = np.argsort(noisy, kind="stable")
        size = self.schedule.batch_size
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        if len(batches[-1]) == 1 and not self.lone_rows:
            batches[-1] = np.append(batches[-1], order[0])  # one row has no statistics
        return [batches[index] for index in random.permutation(len(batches))]


def _optimizers(classifier: Classifier, schedule: Schedule) -> list[torch.optim.Optimizer]:
    """AdamW; and Adam that touches only the rows seen, for tables whose gradients are sparse."""
    tables = [
        module.weight
        for module in classifier.modules()
        if isinstance(module, nn.Embedding) and module.sparse
    ]
    known = {id(table) for table in tables}
    rest = [each for each in classifier.parameters() if id(each) not in known]
    rate = schedule.learning_rate
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=rate, weight_decay=schedule.weight_decay, fused=True)
    ]
    if tables:
        optimizers.append(torch.optim.SparseAdam(tables, lr=rate))
    return optimizers


def _clip(classifier: Classifier, most: float) -> None:
    """torch's `clip_grad_norm_`, for gradients of which some are sparse."""
    values = []
    for parameter in classifier.parameters():
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()  # a row that was met twice counts once
            values.append(parameter.grad.values())
        elif parameter.grad is not None:
            values.append(parameter.grad)
    scale = (most / (torch.nn.utils.get_total_norm(values) + 1e-6)).clamp(max=1.0)
    for each in values:
        each.mul_(scale)


def _tensors(classifier: Classifier, encoded: Sequence[Any], device: str) -> Tensors:
    inputs = classifier.preprocessor.collate(encoded)
    return tuple(torch.from_numpy(array).to(device) for array in inputs.values())


def _precision(device: str) -> contextlib.AbstractContextManager[object]:
    """bf16 arithmetic where it is faster, else plain fp32.

    avx512_bf16 alone multiplies, but fp32 weights are converted at each step: measured on a Xeon,
    MiniLM takes 400 ms a step with it and 290 without.
    """
    if device == "cuda" or "amx_bf16" in cpu_flags():
        return torch.autocast(device, dtype=torch.bfloat16)
    return contextlib.nullcontext()
