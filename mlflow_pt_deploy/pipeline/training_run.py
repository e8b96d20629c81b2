"""Train a model as a run: log each epoch, and save the trained model as the run's artifact."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow

from mlflow_pt_deploy import tracking
from mlflow_pt_deploy.config import Options
from mlflow_pt_deploy.data import Split, Splits
from mlflow_pt_deploy.evaluation.chance import chance_note
from mlflow_pt_deploy.pipeline.training_group import training_group
from mlflow_pt_deploy.system.paths import work_folder

if TYPE_CHECKING:
    from mlflow_pt_deploy.models import Classifier
    from mlflow_pt_deploy.training.optimization import Schedule
    from mlflow_pt_deploy.training.process_group import ProcessGroup
    from mlflow_pt_deploy.training.training_state import Epoch, Loss

EPOCHS = {"train": {True: 5, False: 20}, "distill": {True: 6, False: 30}}
"""Default epochs by stage and by whether the model is pretrained."""


@dataclass(frozen=True)
class TrainingTask:
    """Training data and loss of a model.

    Attributes:
        loss: Loss of a batch.
        rows: Training rows; None: the train split.
    """

    loss: Loss
    rows: Split | None = None


@dataclass(frozen=True)
class TrainedModel:
    """A trained model.

    Attributes:
        run_id: The run that trained it.
        model: Its URI, ``runs:/RUN_ID/model``.
        validation_accuracy: Share of validation rows that it classifies correctly.
        seconds: Training time, without interruptions.
    """

    run_id: str
    model: str
    validation_accuracy: float
    seconds: float


@dataclass(frozen=True)
class Training:
    """A training that can start.

    Attributes:
        stage: Stage tag of its run.
        splits: The data; `validation` is used for the accuracy.
        classifier: The model, trained in place.
        task: Training rows and loss.
        epochs: Passes over the rows; 0: no training; below 0: see `EPOCHS`.
    """

    stage: str
    splits: Splits
    classifier: Classifier
    task: TrainingTask
    epochs: int


def fit_in_run(training: Training, options: Options) -> TrainedModel:
    """Train a model as a run with the model as its artifact.

    Args:
        training: The model and its data.
        options: `resume` is the run to continue, if any.
    """
    from mlflow_pt_deploy.models import save_classifier
    from mlflow_pt_deploy.training.inference import predict_logits

    stage, splits, classifier = training.stage, training.splits, training.classifier
    schedule = resolve_schedule(training, options)
    with tracking.stage_run(stage, stage, resume=options.resume, options=options.to_json()) as run:
        work = work_folder(run.info.run_id)
        if not options.resume:
            mlflow.log_params(_parameters(schedule, run.data.params))
        tracking.log_device(run, options.device)
        tracking.log_dataset_facts(splits)
        history: list[Epoch] = []
        if schedule.epochs:
            with training_group(stage, options) as group:
                history = run_epochs(
                    training,
                    options,
                    schedule,
                    group=group,
                    checkpoint=work / "checkpoint.pt",
                    on_epoch=partial(_log_epoch, stage, schedule.epochs),
                )
        seconds = float(sum(epoch.seconds for epoch in history))
        rows, targets = splits.validation.rows, splits.validation.targets
        predicted = predict_logits(classifier, rows, device=options.device).argmax(axis=1)
        accuracy = float((predicted == targets).mean())
        if note := chance_note(targets, predicted, classifier.labels):
            print(f"{stage}: the model {note}.", flush=True)
        mlflow.log_metrics({"accuracy": accuracy}, dataset=tracking.dataset(splits, "validation"))
        mlflow.log_metric("seconds", seconds)
        save_classifier(classifier.to("cpu"), work / "model")
        uri = tracking.log_folder(work / "model", "model")
        shutil.rmtree(work, ignore_errors=True)
    return TrainedModel(run.info.run_id, uri, accuracy, seconds)


def run_epochs(
    training: Training,
    options: Options,
    schedule: Schedule,
    *,
    group: ProcessGroup,
    checkpoint: Path | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
) -> list[Epoch]:
    """Train the model in place, in every process of the group; see `trainer.fit`."""
    from mlflow_pt_deploy.training.qat import int8_rounding
    from mlflow_pt_deploy.training.trainer import fit

    int8 = training.stage == "distill" and options.student_precision == "int8-qat"
    with int8_rounding(training.classifier.network) if int8 else nullcontext():
        return fit(
            training.classifier,
            replace(training.splits, train=training.task.rows or training.splits.train),
            training.task.loss,
            schedule,
            device=options.device,
            checkpoint=checkpoint,
            on_epoch=on_epoch,
            group=group,
        )


def resolve_schedule(training: Training, options: Options) -> Schedule:
    """Hyperparameters of a training, with the defaults of its stage and model."""
    from mlflow_pt_deploy.training.optimization import Schedule

    epochs, classifier = training.epochs, training.classifier
    return Schedule(
        epochs=epochs if epochs >= 0 else EPOCHS[training.stage][classifier.pretrained],
        learning_rate=options.learning_rate,
        batch_size=options.batch_size,
        seed=options.seed,
    ).resolved(classifier)


def _parameters(schedule: Schedule, logged: Mapping[str, str]) -> dict[str, Any]:
    """Hyperparameters by the names under which they can be logged.

    Args:
        schedule: The hyperparameters.
        logged: Parameters of the run: `mlflow run` logs the options as given, e.g. a learning rate
            of 0, and MLflow allows no other value later.
    """
    values = asdict(schedule)
    taken = {name for name in values if name in logged and logged[name] != str(values[name])}
    return {f"resolved_{name}" if name in taken else name: values[name] for name in values}


def _log_epoch(stage: str, epochs: int, epoch: Epoch) -> None:
    mlflow.log_metrics(
        {"train_loss": epoch.train_loss, "validation_accuracy": epoch.validation_accuracy},
        step=epoch.number,
    )
    print(
        f"{stage}: epoch {epoch.number}/{epochs}, loss {epoch.train_loss:.4f}, "
        f"validation accuracy {epoch.validation_accuracy:.4f}, {epoch.seconds:.0f} s",
        flush=True,
    )
