"""The stages train → distill → optimize; each can run on its own.

A stage opens a run (or joins the active one), trains or measures, and logs the result.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow

from mlflow_pt_deploy import tracking
from mlflow_pt_deploy.config import Options
from mlflow_pt_deploy.data import Splits, load_data
from mlflow_pt_deploy.data.splits import align
from mlflow_pt_deploy.errors import ModelError
from mlflow_pt_deploy.model_types import STATIC
from mlflow_pt_deploy.pipeline.device import on_this_machine
from mlflow_pt_deploy.pipeline.optimize import OptimizationResult, optimize
from mlflow_pt_deploy.pipeline.training_run import (
    TrainedModel,
    Training,
    TrainingTask,
    fit_in_run,
)
from mlflow_pt_deploy.runtimes.catalog import select
from mlflow_pt_deploy.system import interrupt
from mlflow_pt_deploy.system.device import CPU
from mlflow_pt_deploy.system.paths import home
from mlflow_pt_deploy.tracking_server import check_tracking

if TYPE_CHECKING:
    from mlflow_pt_deploy.models import Classifier

TEACHER, STUDENT, STATIC_STUDENT, MODEL = "teacher", "student", "static", "model"


def train_teacher(
    options: Options,
    splits: Splits | None = None,
    *,
    before: Callable[[Classifier, Splits], None] | None = None,
) -> TrainedModel:
    """Train `options.teacher` on the data, as a run with the model as its artifact.

    An interrupted training continues from its checkpoint if `options.resume` is its run.

    Args:
        options: Options of the teacher.
        splits: The data, if it is loaded already.
        before: Called before the training with the teacher and the data in its class numbers.

    Raises:
        ModelError: The model cannot be found, saved or loaded, or `epochs` is 0 and it has other
            labels.
    """
    from mlflow_pt_deploy.pipeline.dry_run import dry_run
    from mlflow_pt_deploy.training.trainer import check_fit

    options = on_this_machine(options)
    training = start_teacher(options, splits)
    classifier, splits = training.classifier, training.splits
    check_fit(classifier, splits)
    interrupt.check()
    dry_run(classifier, splits.train.rows, "the teacher")
    if before is not None:
        before(classifier, splits)
    return fit_in_run(training, options)


def start_teacher(options: Options, splits: Splits | None = None) -> Training:
    """Load the data and the model of `train_teacher`, which checks them."""
    from mlflow_pt_deploy.models import load_classifier, new_classifier
    from mlflow_pt_deploy.training.trainer import cross_entropy

    splits = splits or _load_splits(options)
    source = tracking.fetch_model(options.teacher)
    if options.epochs == 0:
        classifier = load_classifier(source)
        splits = align(splits, classifier.labels)
    else:
        classifier = new_classifier(
            source, splits.labels, splits.train.rows, image_size=options.image_size
        )
    task = TrainingTask(cross_entropy(splits.train.targets))
    return Training("train", splits, classifier, task, options.epochs)


def distill_student(options: Options, splits: Splits | None = None) -> TrainedModel:
    """Distill a student with `options.student_layers` layers from a fine-tuned teacher.

    With 0 layers the student is static and trained for `options.static_epochs`. For images the
    student is a MobileNetV2, and the layers are ignored.

    Raises:
        DataError: The teacher was not fine-tuned on these labels, or reads other inputs.
        ModelError: The teacher has fewer layers, or an option is for texts only.
    """
    from mlflow_pt_deploy.pipeline.dry_run import dry_run_students
    from mlflow_pt_deploy.training.trainer import check_fit

    options = on_this_machine(options)

    def check(teacher: Classifier, splits: Splits) -> None:
        check_fit(teacher, splits)
        interrupt.check()
        students = replace(options, trials=0, student_epochs=1, static_epochs=0)
        dry_run_students(teacher, students, splits)

    return fit_in_run(start_student(options, splits, before=check), options)


def start_student(
    options: Options,
    splits: Splits | None = None,
    *,
    before: Callable[[Classifier, Splits], None] | None = None,
) -> Training:
    """Load the data and the teacher of `distill_student`, and build the student.

    Args:
        options: Options of the student.
        splits: The data, if it is loaded already.
        before: Called with the teacher and the data before the student is built.
    """
    import torch

    from mlflow_pt_deploy.models import load_classifier
    from mlflow_pt_deploy.pipeline.students import init_student

    splits = splits or _load_splits(options)
    teacher = load_classifier(tracking.fetch_model(options.teacher))
    splits = align(splits, teacher.labels)
    torch.manual_seed(options.seed)
    if before is not None:
        before(teacher, splits)
    student = init_student(teacher, options, splits)
    task = _distillation_task(teacher, student, options, splits)
    epochs = options.student_epochs if options.student_layers else options.static_epochs
    return Training(distill_stage(options), splits, student, task, epochs)


def _distillation_task(
    teacher: Any, student: Any, options: Options, splits: Splits
) -> TrainingTask:
    """Loss and rows of a distillation: texts are labelled once, images anew in each epoch."""
    from mlflow_pt_deploy.training.distillation import (
        add_similarity_loss,
        distillation_loss,
        label_with_teacher,
        online_distillation_loss,
    )

    settings = {"temperature": options.temperature, "weight": options.soft_weight}
    if splits.column == "image":
        return TrainingTask(
            online_distillation_loss(teacher.to(options.device), splits.train.targets, **settings)
        )
    count = round((1 + options.made_texts) * len(splits.train))
    print(f"distill: the teacher labels {count} rows", flush=True)
    cache, made = home() / "logits", options.made_texts
    labels = label_with_teacher(
        teacher, splits.train, cache, made=made, seed=options.seed, device=options.device
    )
    loss = distillation_loss(labels.logits, labels.split.targets, **settings)
    loss = add_similarity_loss(loss, student, labels.features, options.relation_weight)
    return TrainingTask(loss, labels.split)


def distill_stage(options: Options) -> str:
    """Stage tag of a student's run: ``distill`` or ``distill-static``."""
    return "distill" if options.student_layers else "distill-static"


def run_or_resume(
    parent: str,
    stage: str,
    work: Callable[[Options, Splits], TrainedModel],
    options: Options,
    splits: Splits,
) -> TrainedModel:
    """Run a stage as a child of `parent`; a resumed parent reuses or resumes its earlier child."""
    run = tracking.latest_child_run(parent, stage) if options.resume else None
    options = replace(options, resume="")
    if run is None or run.data.tags.get(tracking.OPTIONS_TAG) != options.to_json():
        return work(options, splits)
    if run.info.status == "FINISHED":
        metrics = run.data.metrics
        uri = f"runs:/{run.info.run_id}/model"
        return TrainedModel(run.info.run_id, uri, metrics["accuracy"], metrics["seconds"])
    return work(replace(options, resume=run.info.run_id), splits)


def optimize_models(options: Options, splits: Splits | None = None) -> OptimizationResult:
    """Build, measure and log every variant, and choose one; nothing is promoted.

    The variants become children of the active run, or of a new run.

    Raises:
        DataError: A model has other labels than the data, or reads other inputs.
        ModelError: A model cannot be read.
        UnsupportedError: PyTorch cannot use the device.
        VariantError: The baseline, eager fp32, cannot be measured.
    """
    from mlflow_pt_deploy.models import load_classifier
    from mlflow_pt_deploy.training.trainer import check_fit

    options = on_this_machine(options)
    check_selection(options)  # before anything is loaded
    splits = splits or _load_splits(options)
    baseline = TEACHER if options.student else MODEL
    models = {baseline: Path(tracking.fetch_model(options.teacher))}
    models |= _students(options.student)
    for path in models.values():
        interrupt.check()
        classifier = load_classifier(str(path))
        splits = align(splits, classifier.labels)
        check_fit(classifier, splits)
    active = mlflow.active_run()
    if active is not None:
        return optimize(active.info.run_id, models, splits, options)
    name = f"{splits.name} optimize"
    with tracking.stage_run(
        "optimize", name, resume=options.resume, options=options.to_json()
    ) as run:
        tracking.log_device(run, options.device)
        tracking.log_dataset_facts(splits)
        return optimize(run.info.run_id, models, splits, options)


def check_selection(options: Options) -> None:
    """Check what is built and how it is chosen, before hours are spent.

    Args:
        options: With the device of this machine.

    Raises:
        VariantError: The name of a variant is unknown.
        PolicyError: A limit or the objective is invalid, or the price of a GPU is missing.
    """
    select(options.variants, options.device)
    policy = options.selection_policy()
    if options.device != CPU:
        policy.check_gpu_price()


def _students(uris: str) -> dict[str, Path]:
    """Fetch the models of a comma-separated list; ``student`` or ``static`` to folder."""
    found: dict[str, Path] = {}
    for uri in filter(None, (part.strip() for part in uris.split(","))):
        path = Path(tracking.fetch_model(uri))
        config = json.loads((path / "config.json").read_text(encoding="utf8"))
        name = STATIC_STUDENT if config.get("model_type") == STATIC else STUDENT
        if name in found:
            raise ModelError(
                f"student: {uri} is the second {name} model; give at most one transformer and one "
                "static student."
            )
        found[name] = path
    return found


def _load_splits(options: Options) -> Splits:
    check_tracking()
    return load_data(options.data, seed=options.seed, limit=options.limit, on_note=print)
