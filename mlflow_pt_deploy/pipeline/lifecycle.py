"""The whole pipeline: all stages in order, as one parent run that can be resumed.

rows → teacher → student → variants → measurements → MLflow models → choice → alias
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
from mlflow_pt_deploy.config import Options
from mlflow_pt_deploy.data import Splits, load_data
from mlflow_pt_deploy.errors import NotPromotedError
from mlflow_pt_deploy.pipeline.device import on_this_machine
from mlflow_pt_deploy.pipeline.optimize import OptimizationResult
from mlflow_pt_deploy.pipeline.promotion_stage import check_champion, promote_choice
from mlflow_pt_deploy.pipeline.report_stage import log_report
from mlflow_pt_deploy.pipeline.search_stage import search_students
from mlflow_pt_deploy.pipeline.stages import (
    check_selection,
    distill_stage,
    distill_student,
    optimize_models,
    run_or_resume,
    train_teacher,
)
from mlflow_pt_deploy.pipeline.training_run import TrainedModel
from mlflow_pt_deploy.registry.promotion import Promotion, check_name
from mlflow_pt_deploy.tracking_server import check_tracking

if TYPE_CHECKING:
    from mlflow_pt_deploy.models import Classifier


@dataclass(frozen=True)
class LifecycleResult:
    """Outcome of the pipeline.

    Attributes:
        run_id: The parent run.
        column: Input column, ``text`` or ``image``.
        optimized: Results of all variants, and the choice.
        promotion: The new champion, or None if the earlier one stays.
        seconds: Wall time of each stage.
        why_not: Why the earlier champion stays; empty if it was replaced.
        name: Name of the registered model.
    """

    run_id: str
    column: str
    optimized: OptimizationResult
    promotion: Promotion | None
    seconds: Mapping[str, float]
    why_not: str = ""
    name: str = ""


def run_lifecycle(options: Options) -> LifecycleResult:
    """Train, distill, optimize, choose and promote, as one parent run.

    Args:
        options: With `resume`, the saved options of that run are used instead.

    Raises:
        NotPromotedError: No variant meets the limits.
        UnsupportedError: PyTorch cannot use the device; nothing was started.
        PtDeployError: A stage failed; finished stages are kept for `resume`.
    """
    check_tracking()
    if options.resume:
        saved = tracking.saved_options(options.resume)
        kept = "yes" if "yes" in (saved.replace, options.replace) else "no"
        options = replace(
            saved,
            resume=options.resume,
            storage=options.storage,
            processes=options.processes,
            replace=kept,
        )
    options = on_this_machine(options)
    check_selection(options)  # before training, as is the next one
    check_name(options.name)
    splits = load_data(options.data, seed=options.seed, limit=options.limit, on_note=print)
    if options.replace == "no":
        check_champion(options.name, tracking.conditions(splits, options.device))
    seconds: dict[str, float] = {}
    train = partial(train_teacher, before=_dry_run(options))
    with tracking.stage_run(
        "run", f"{splits.name} lifecycle", resume=options.resume, options=options.to_json()
    ) as parent:
        run_id = parent.info.run_id
        if options.resume:
            tracking.terminate_abandoned_children(run_id)
        tracking.log_device(parent, options.device)
        tracking.log_dataset_facts(splits)
        teacher = run_or_resume(run_id, "train", train, options, splits)
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
            promotion, why_not = _promote(optimized, options)
            log_report(optimized, options.name, why_not)
        mlflow.log_metrics({f"{stage}_seconds": value for stage, value in seconds.items()})
    return LifecycleResult(
        run_id, splits.column, optimized, promotion, seconds, why_not, options.name
    )


def _promote(optimized: OptimizationResult, options: Options) -> tuple[Promotion | None, str]:
    """Promote the choice; a champion that stays is a result, not an error."""
    try:
        return promote_choice(optimized, options.name, replace=options.replace == "yes"), ""
    except NotPromotedError as error:
        if not error.champion_stays:
            raise
        return None, str(error)


def _dry_run(options: Options) -> Callable[[Classifier, Splits], None] | None:
    """Function that checks, before the teacher is trained, that its students can be built.

    Call this before the run starts: the imports take seconds.
    """
    from mlflow_pt_deploy.pipeline.dry_run import dry_run_students

    if options.student:
        return None
    return lambda teacher, splits: dry_run_students(teacher, options, splits)


def _students(parent: str, options: Options, splits: Splits) -> list[TrainedModel]:
    """Students of a search, or one of each kind: a smaller one and, for texts, a static one."""
    if options.trials:
        earlier = tracking.latest_child_run(parent, "search") if options.resume else None
        resumed = replace(options, resume=earlier.info.run_id if earlier else "")
        return list(search_students(resumed, splits).students)
    students = []
    for layers, epochs in (
        (options.student_layers, options.student_epochs),
        (0, options.static_epochs if splits.column == "text" else 0),
    ):
        if epochs:
            chosen = replace(options, student_layers=layers)
            stage = distill_stage(chosen)
            students.append(run_or_resume(parent, stage, distill_student, chosen, splits))
    return students


@contextmanager
def _timed(stage: str, seconds: dict[str, float]) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[stage] = round(time.monotonic() - started, 1)
