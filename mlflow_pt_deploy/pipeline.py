"""The straight line: one stage after the other, as one parent run.

    rows → teacher → student → variants → measurements → MLflow models → choice → alias

Knows the order of things and how to go on after an interruption; computes and logs nothing itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import mlflow

from mlflow_pt_deploy import tracking
from mlflow_pt_deploy.data import Splits, load_data
from mlflow_pt_deploy.fitting import Trained
from mlflow_pt_deploy.optimize import Optimized
from mlflow_pt_deploy.options import Options
from mlflow_pt_deploy.promote import Promotion
from mlflow_pt_deploy.reach import check_tracking
from mlflow_pt_deploy.searches import search_students
from mlflow_pt_deploy.stages import (
    distill_stage,
    distill_student,
    optimize_models,
    promote_choice,
    train_teacher,
    unless_finished,
)
from mlflow_pt_deploy.variants import select

if TYPE_CHECKING:
    from mlflow_pt_deploy.models import Classifier


@dataclass(frozen=True)
class Lifecycle:
    """The whole line's outcome: what rows are, and the wall time of each stage in seconds."""

    run_id: str
    column: str
    optimized: Optimized
    promotion: Promotion
    seconds: Mapping[str, float]


def run_lifecycle(options: Options) -> Lifecycle:
    """Train, distill, optimize, choose and promote, as one parent run.

    Args:
        options: With `resume`, the options of that run are taken instead.

    Raises:
        PtDeployError: A stage cannot go on; what was finished is kept and resumed from.
    """
    check_tracking()
    if options.resume:
        saved = tracking.saved_options(options.resume)
        options = replace(saved, resume=options.resume, storage=options.storage)
    options.policy()
    select(options.variants)
    splits = load_data(options.data, seed=options.seed, limit=options.limit, say=print)
    seconds: dict[str, float] = {}
    train = partial(train_teacher, before=_rehearsal(options))
    with tracking.stage_run(
        "run", f"{splits.name} lifecycle", resume=options.resume, options=options.to_json()
    ) as parent:
        run_id = parent.info.run_id
        if options.resume:
            tracking.end_abandoned(run_id)
        tracking.log_dataset_facts(splits)
        teacher = unless_finished(run_id, "train", train, options, splits)
        seconds["train"] = teacher.seconds
        options = replace(options, teacher=teacher.model, epochs=0)
        if not options.student:
            started = time.monotonic()
            students = _students(run_id, options, splits)
            if options.trials:
                seconds["search"] = round(time.monotonic() - started, 1)
            elif students:
                seconds["distill"] = sum(student.seconds for student in students)
            options = replace(options, student=",".join(student.model for student in students))
        with _timed("optimize", seconds):
            optimized = optimize_models(replace(options, resume=""), splits)
        with _timed("promote", seconds):
            promotion = promote_choice(optimized, options.name)
        mlflow.log_metrics({f"{stage}_seconds": value for stage, value in seconds.items()})
    return Lifecycle(run_id, splits.column, optimized, promotion, seconds)


def _rehearsal(options: Options) -> Callable[[Classifier, Splits], None] | None:
    """What makes sure, before the teacher is trained, that its students can be made.

    Called before the run begins: the imports take seconds, in which nothing should be at stake.
    """
    from mlflow_pt_deploy.rehearsal import rehearse_students

    if options.student:
        return None
    return lambda teacher, splits: rehearse_students(teacher, options, splits)


def _students(parent: str, options: Options, splits: Splits) -> list[Trained]:
    """Those that a search leads to, or one of each kind: for texts, a static one too."""
    if options.trials:
        before = tracking.child_run(parent, "search") if options.resume else None
        again = replace(options, resume=before.info.run_id if before else "")
        return list(search_students(again, splits).students)
    made = []
    for layers, epochs in (
        (options.student_layers, options.student_epochs),
        (0, options.static_epochs if splits.column == "text" else 0),
    ):
        if epochs:
            wanted = replace(options, student_layers=layers)
            stage = distill_stage(wanted)
            made.append(unless_finished(parent, stage, distill_student, wanted, splits))
    return made


@contextmanager
def _timed(stage: str, seconds: dict[str, float]) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[stage] = round(time.monotonic() - started, 1)
