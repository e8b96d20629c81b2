"""A model is trained in a run: each epoch is logged, and what it came to is the run's artifact.

Knows the run; what is learned from is the stage's, how to fit is `train`'s.
"""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import mlflow

from mlflow_pt_deploy import tracking
from mlflow_pt_deploy.data import Split, Splits
from mlflow_pt_deploy.home import work_folder
from mlflow_pt_deploy.measure.chance import chance_note
from mlflow_pt_deploy.options import Options

if TYPE_CHECKING:
    from mlflow_pt_deploy.models import Classifier
    from mlflow_pt_deploy.train import Epoch, Loss, Schedule

EPOCHS = {"train": {True: 5, False: 20}, "distill": {True: 6, False: 30}}
"""Passes over train where a user left them to us, by stage and whether a model is pretrained."""


@dataclass(frozen=True)
class Lesson:
    """What a model learns from.

    Attributes:
        loss: Of a batch of it.
        rows: What it is shown; None: train.
    """

    loss: Loss
    rows: Split | None = None


@dataclass(frozen=True)
class Trained:
    """A trained model.

    Attributes:
        run_id: The run that made it.
        model: Its address, ``runs:/RUN_ID/model``.
        validation_accuracy: Share of validation rows it labels right.
        seconds: Time that training took, interruptions left out.
    """

    run_id: str
    model: str
    validation_accuracy: float
    seconds: float


def fit_in_run(
    stage: str,
    options: Options,
    splits: Splits,
    classifier: Classifier,
    lesson: Lesson,
    epochs: int,
) -> Trained:
    """Train a model as a run that ends with the model as its artifact.

    Args:
        stage: How the run is tagged.
        options: With `resume`, the run to go on with.
        splits: Judged on `validation`.
        classifier: Trained in place.
        lesson: What it learns from.
        epochs: Passes over that; 0: it stays as it is; below 0: as `EPOCHS` has it.
    """
    from mlflow_pt_deploy.models import save_classifier
    from mlflow_pt_deploy.rounding import int8_rounding
    from mlflow_pt_deploy.train import fit, predict_logits

    schedule = _schedule(stage, options, classifier, epochs)
    aware = stage == "distill" and options.student_precision == "int8-qat"
    with tracking.stage_run(stage, stage, resume=options.resume, options=options.to_json()) as run:
        work = work_folder(run.info.run_id)
        if not options.resume:
            mlflow.log_params(asdict(schedule))
        tracking.log_dataset_facts(splits)
        history: list[Epoch] = []
        if schedule.epochs:
            with int8_rounding(classifier.network) if aware else nullcontext():
                history = fit(
                    classifier,
                    replace(splits, train=lesson.rows or splits.train),
                    lesson.loss,
                    schedule,
                    device=options.device,
                    checkpoint=work / "checkpoint.pt",
                    on_epoch=partial(_log, stage, schedule.epochs),
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
        address = tracking.log_folder(work / "model", "model")
        shutil.rmtree(work, ignore_errors=True)
    return Trained(run.info.run_id, address, accuracy, seconds)


def _schedule(stage: str, options: Options, classifier: Classifier, epochs: int) -> Schedule:
    from mlflow_pt_deploy.train import Schedule

    return Schedule(
        epochs=epochs if epochs >= 0 else EPOCHS[stage][classifier.pretrained],
        learning_rate=options.learning_rate,
        batch_size=options.batch_size,
        seed=options.seed,
    ).resolved(classifier)


def _log(stage: str, epochs: int, epoch: Epoch) -> None:
    mlflow.log_metrics(
        {"train_loss": epoch.train_loss, "validation_accuracy": epoch.validation_accuracy},
        step=epoch.number,
    )
    print(
        f"{stage}: epoch {epoch.number}/{epochs}, loss {epoch.train_loss:.4f}, "
        f"validation accuracy {epoch.validation_accuracy:.4f}, {epoch.seconds:.0f} s",
        flush=True,
    )
