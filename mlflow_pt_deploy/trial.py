"""One point of a search: trained, built, measured, and logged as a child run.

Knows what a trial is worth and where its run lies; what to try next is `search`'s to say.
"""

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
from mlflow_pt_deploy.data import Split, Splits
from mlflow_pt_deploy.distill import soft_labels, teach, with_relations
from mlflow_pt_deploy.errors import VariantError
from mlflow_pt_deploy.home import home
from mlflow_pt_deploy.measure import measure
from mlflow_pt_deploy.models import save_classifier
from mlflow_pt_deploy.options import Options
from mlflow_pt_deploy.prune import new_student
from mlflow_pt_deploy.search import Outcome, Point, Report
from mlflow_pt_deploy.train import Epoch, Loss, Schedule, fit
from mlflow_pt_deploy.variants.build import build
from mlflow_pt_deploy.variants.table import VARIANTS, select

if TYPE_CHECKING:
    from mlflow_pt_deploy.models import Classifier


class Evaluator:
    """What a search calls with each point.

    Accuracy and latency are those of the reloaded variant in a fresh process; rows of `test` are
    not looked at.

    Args:
        teacher: Teaches all of them.
        splits: Where rows and targets come from.
        options: Device, seed and timing budget.
        work: Folder for what a trial leaves until it is measured.
    """

    def __init__(self, teacher: Classifier, splits: Splits, options: Options, work: Path) -> None:
        nothing = Split((), np.empty(0, dtype=np.int64))
        self._splits = replace(splits, test=nothing)
        self._teacher, self._options, self._work = teacher, options, work
        cache = home() / "logits"
        self._lesson = teach(
            teacher,
            splits.train,
            cache,
            made=options.made_texts,
            seed=options.seed,
            device=options.device,
        )
        self._taught = replace(self._splits, train=self._lesson.split)
        self._baseline: Path | None = None

    def __call__(self, point: Point, report: Report) -> Outcome:
        started = time.monotonic()
        with _trial_run(report.number, point):

            def on_epoch(epoch: Epoch) -> None:
                accuracy = epoch.validation_accuracy
                mlflow.log_metric("validation_accuracy", accuracy, step=epoch.number)
                report(epoch.number, accuracy)

            student = self._student(point)
            fit(
                student,
                self._taught,
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
        """Where all static students start; to ask the teacher for each piece takes a while."""
        torch.manual_seed(self._options.seed)  # so that it is the same when it is trained again
        return new_student(self._teacher, self._splits.train, 0)

    def _student(self, point: Point) -> Classifier:
        """What is taught: a static student, or a part of the teacher."""
        if not point.layers:
            return copy.deepcopy(self._static)
        return new_student(
            self._teacher,
            self._splits.train,
            point.layers,
            heads=point.heads,
            width=point.width,
        )

    def _loss(self, point: Point, student: Classifier) -> Loss:
        lesson = self._lesson
        loss = soft_labels(
            lesson.logits,
            lesson.split.targets,
            temperature=point.temperature,
            weight=point.soft_weight,
        )
        return with_relations(loss, student, lesson.features, self._options.relation_weight)

    def _measure(self, student: Classifier, point: Point, folder: Path) -> Outcome:
        """Of the student as its variant runs it, reloaded in a fresh process."""
        reference, name = self._built_baseline(), "student" if point.layers else "static"
        try:
            save_classifier(student, folder / "model")
            variant = select(point.variant)[-1]
            (built,) = build(
                {name: folder / "model"}, self._splits, folder, variants=[variant], parallel=1
            )
            if built.folder is None:
                raise VariantError(f"{built.name}: {built.reason}")
            (result,) = measure(
                {reference.name: reference, built.name: built.folder},
                baseline=reference.name,
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
        return Outcome(accuracy, latency)

    def _built_baseline(self) -> Path:
        """The eager teacher, built when the first trial needs it."""
        if self._baseline is None:
            source = self._work / "model"
            save_classifier(self._teacher, source)
            (built,) = build({"teacher": source}, self._splits, self._work, variants=VARIANTS[:1])
            if built.folder is None:
                raise VariantError(f"{built.name}: {built.reason}")
            self._baseline = built.folder
        return self._baseline


@contextmanager
def _trial_run(number: int, point: Point) -> Iterator[None]:
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
