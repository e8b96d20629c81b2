"""The state of a training run: its steps, epochs, best weights, and its checkpoint."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mlflow_pt_deploy.data import Split
from mlflow_pt_deploy.errors import DataError
from mlflow_pt_deploy.models import Classifier
from mlflow_pt_deploy.system import interrupt
from mlflow_pt_deploy.system.device import CUDA, kind_of
from mlflow_pt_deploy.system.progress import Progress
from mlflow_pt_deploy.training.inference import Tensors, evaluate, to_tensors
from mlflow_pt_deploy.training.optimization import (
    Schedule,
    autocast,
    clip_gradients,
    compute_dtype,
    new_grad_scaler,
    new_optimizers,
)
from mlflow_pt_deploy.training.process_group import ProcessGroup, check_shares

Loss = Callable[[torch.Tensor, torch.Tensor, Tensors], torch.Tensor]
"""Maps logits (batch, classes), the row indices in train, int64 (batch,), and the model inputs to a
scalar loss."""

_CHECKPOINT_EVERY_S = 60.0
_MAX_ENCODED_BYTES = 2e9  # larger image sets are encoded batch by batch


@dataclass(frozen=True)
class Epoch:
    """Result of one epoch: mean loss on train, accuracy on validation, duration in seconds."""

    number: int
    train_loss: float
    validation_accuracy: float
    seconds: float


class TrainingState:
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
            classifier, to_tensors(classifier, self._encode(np.arange(1)), device)
        )
        self.steps_per_epoch = -(-len(train) // schedule.batch_size)
        self.total_steps = self.steps_per_epoch * schedule.epochs
        self.step = 0
        self.losses: list[float] = []
        self.epochs: list[Epoch] = []
        self.best: dict[str, torch.Tensor] = {}
        self.dtype = compute_dtype(device)
        self.scaler = new_grad_scaler(device, self.dtype)
        self.optimizers = new_optimizers(classifier, schedule)
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
            "scaler": self.scaler.state_dict(),
            "random": torch.get_rng_state(),
            "device_random": self._device_random(),
            "step": self.step,
            "losses": self.losses,
            "epochs": [asdict(epoch) for epoch in self.epochs],
            "best": self.best,
        }

    def restore(self, content: bytes) -> None:
        saved = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
        if saved["schedule"] != asdict(self.schedule):
            raise DataError(
                f"the checkpoint was made with {saved['schedule']}, and this run has "
                f"{asdict(self.schedule)}. Resume with the same options, or start a new run."
            )
        self.classifier.load_state_dict(saved["classifier"])
        for name in ("optimizers", "schedulers"):
            for each, state in zip(getattr(self, name), saved[name], strict=True):
                each.load_state_dict(state)
        if saved.get("scaler") and self.scaler.is_enabled():
            self.scaler.load_state_dict(saved["scaler"])
        torch.set_rng_state(saved["random"])
        random = saved.get("device_random")
        if random is not None and kind_of(self.device) == CUDA:
            torch.cuda.set_rng_state(random, self.device)
        self.step, self.losses, self.best = saved["step"], saved["losses"], saved["best"]
        self.epochs = [Epoch(**epoch) for epoch in saved["epochs"]]

    def _train_step(self, loss: Loss, rows: npt.NDArray[np.int64]) -> float:
        # Seeded by the step: a resumed run repeats what an uninterrupted run would do.
        random = np.random.default_rng((self.schedule.seed, self.step, self.group.rank))
        if self.group.size > 1:  # dropout differs between the processes
            torch.manual_seed(int(random.integers(2**62)))
        rows, weight = self.group.share(rows, self.least)
        augmented = self.classifier.augment(self._encode(rows), random)
        inputs = to_tensors(self.classifier, augmented, self.device)
        with autocast(self.device, self.dtype):
            logits = self.model(*inputs)
            value = weight * loss(logits.float(), torch.from_numpy(rows), inputs)
        self.scaler.scale(value).backward()
        # Before the step: where another process has ended, the weights are still those of the last.
        number = self.group.sum(value.item()) / self.group.size
        if not np.isfinite(number):
            raise DataError("the training loss is not a number; try a lower --learning-rate.")
        self._update_weights()
        return number

    def _update_weights(self) -> None:
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        clip_gradients(self.classifier, 1.0)
        for optimizer, scheduler in zip(self.optimizers, self.schedulers, strict=True):
            self.scaler.step(optimizer)  # does nothing where fp16 overflowed
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()

    def _device_random(self) -> torch.Tensor | None:
        """State of the GPU's random numbers, which dropout takes; None on the CPU."""
        if kind_of(self.device) != CUDA:
            return None
        return torch.cuda.get_rng_state(self.device)

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
