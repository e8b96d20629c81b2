"""Objective of a search trial: train, build and measure a student, logged as a child run."""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import mlflow
import numpy as np
import torch

from mlflow_pt_deploy import tracking
from mlflow_pt_deploy.artifacts.builder import build
from mlflow_pt_deploy.config import Options
from mlflow_pt_deploy.data import Split, Splits
from mlflow_pt_deploy.errors import VariantError
from mlflow_pt_deploy.evaluation import measure
from mlflow_pt_deploy.models import save_classifier
from mlflow_pt_deploy.pruning import new_student
from mlflow_pt_deploy.runtimes.catalog import VARIANTS, select
from mlflow_pt_deploy.search import Outcome, Report, TrialParams
from mlflow_pt_deploy.system.paths import home
from mlflow_pt_deploy.training.distillation import (
    add_similarity_loss,
    distillation_loss,
    label_with_teacher,
)
from mlflow_pt_deploy.training.optimization import Schedule
from mlflow_pt_deploy.training.trainer import fit
from mlflow_pt_deploy.training.training_state import Epoch, Loss

if TYPE_CHECKING:
    from mlflow_pt_deploy.models import Classifier


class Evaluator:
    """Objective function of a search.

    Accuracy and latency are those of the reloaded variant in a fresh process. The test split is not
    used.

    Args:
        teacher: Teacher of all students.
        splits: The data.
        options: Device, seed and timing budget.
        work: Folder for files of a trial until it is measured.
    """

    def __init__(self, teacher: Classifier, splits: Splits, options: Options, work: Path) -> None:
        empty = Split((), np.empty(0, dtype=np.int64))
        self._splits = replace(splits, test=empty)
        self._teacher, self._options, self._work = teacher, options, work
        cache = home() / "logits"
        self._labels = label_with_teacher(
            teacher,
            splits.train,
            cache,
            made=options.made_texts,
            seed=options.seed,
            device=options.device,
        )
        self._labelled = replace(self._splits, train=self._labels.split)
        self._baseline: Path | None = None

    def __call__(self, point: TrialParams, report: Report) -> Outcome:
        started = time.monotonic()
        with _trial_run(report.number, point):

            def on_epoch(epoch: Epoch) -> None:
                accuracy = epoch.validation_accuracy
                mlflow.log_metric("validation_accuracy", accuracy, step=epoch.number)
                report(epoch.number, accuracy)

            student = self._student(point)
            fit(
                student,
                self._labelled,
                self._loss(point, student),
                Schedule(point.epochs, point.learning_rate, point.batch_size, self._options.seed),
                device=self._options.device,
                on_epoch=on_epoch,
            )
            outcome = self._measure(student, point, self._work / f"trial-{report.number}")
            mlflow.log_metrics(
                {"accuracy": outcome.accuracy, "latency_p50_ms": outcome.latency_ms},
                dataset=tracking.dataset(self._splits, "validation"),
            )
            mlflow.log_metric("seconds", time.monotonic() - started)
        return outcome

    @cached_property
    def _static(self) -> Classifier:
        """Initial static student, shared by all trials: computing its embeddings takes long."""
        torch.manual_seed(self._options.seed)  # the same when the chosen student is trained again
        return new_student(self._teacher, self._splits.train, 0)

    def _student(self, point: TrialParams) -> Classifier:
        """Initial student: static, or a pruned copy of the teacher."""
        if not point.layers:
            return copy.deepcopy(self._static)
        return new_student(
            self._teacher,
            self._splits.train,
            point.layers,
            heads=point.heads,
            width=point.width,
        )

    def _loss(self, point: TrialParams, student: Classifier) -> Loss:
        labels = self._labels
        loss = distillation_loss(
            labels.logits,
            labels.split.targets,
            temperature=point.temperature,
            weight=point.soft_weight,
        )
        return add_similarity_loss(loss, student, labels.features, self._options.relation_weight)

    def _measure(self, student: Classifier, point: TrialParams, folder: Path) -> Outcome:
        """Measure the student's variant, reloaded in a fresh process."""
        baseline, name = self._built_baseline(), "student" if point.layers else "static"
        try:
            save_classifier(student, folder / "model")
            variant = select(point.variant)[-1]
            (built,) = build(
                {name: folder / "model"}, self._splits, folder, variants=[variant], parallel=1
            )
            if built.folder is None:
                raise VariantError(f"{built.name}: {built.reason}")
            (result,) = measure(
                {baseline.name: baseline, built.name: built.folder},
                baseline=baseline.name,
                splits=self._splits,
                seconds=self._options.seconds,
                threads=point.threads,
                only=[built.name],
            )
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        accuracy, latency = result.value("accuracy", "validation"), result.value("latency_p50_ms")
        if accuracy is None or latency is None:
            raise VariantError(f"{built.name}: {result.reason}")
        kept = result.get("accuracy_kept", "validation")
        return Outcome(accuracy, latency, kept.low if kept else None)

    def _built_baseline(self) -> Path:
        """Folder of the eager teacher, built when the first trial needs it."""
        if self._baseline is None:
            source = self._work / "model"
            save_classifier(self._teacher, source)
            (built,) = build({"teacher": source}, self._splits, self._work, variants=VARIANTS[:1])
            if built.folder is None:
                raise VariantError(f"{built.name}: {built.reason}")
            self._baseline = built.folder
        return self._baseline


@contextmanager
def _trial_run(number: int, point: TrialParams) -> Iterator[None]:
    import optuna

    tags = {tracking.STAGE_TAG: "trial", "pt_deploy.trial": str(number)}
    with tracking.open_run(f"trial {number}", tags):
        mlflow.log_params(asdict(point))
        try:
            yield
        except optuna.TrialPruned as pruned:
            mlflow.set_tag(tracking.REASON_TAG, f"stopped early: {pruned}")
            mlflow.end_run("KILLED")
            raise
        except Exception as error:
            mlflow.set_tag(tracking.REASON_TAG, str(error))
            raise
