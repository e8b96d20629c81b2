"""The stages, each of which works alone on what another run left.

train → distill → optimize → promote. Each opens a run (or joins the active one), calls the
science, and logs what it returned. Does not know which stage comes next.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow

from mlflow_pt_deploy import interrupt, tracking
from mlflow_pt_deploy.data import Splits, load_data
from mlflow_pt_deploy.data.splits import align
from mlflow_pt_deploy.errors import ModelError, PolicyError
from mlflow_pt_deploy.fitting import Lesson, Trained, fit_in_run
from mlflow_pt_deploy.home import home
from mlflow_pt_deploy.measure import Result
from mlflow_pt_deploy.optimize import Optimized, optimize
from mlflow_pt_deploy.options import Options
from mlflow_pt_deploy.policy import Policy, choose
from mlflow_pt_deploy.promote import Promotion, promote
from mlflow_pt_deploy.reach import check_tracking
from mlflow_pt_deploy.variants.numpy import STATIC
from mlflow_pt_deploy.variants.table import select

if TYPE_CHECKING:
    from mlflow_pt_deploy.models import Classifier

TEACHER, STUDENT, STATIC_STUDENT, MODEL = "teacher", "student", "static", "model"


def train_teacher(
    options: Options,
    splits: Splits | None = None,
    *,
    before: Callable[[Classifier, Splits], None] | None = None,
) -> Trained:
    """Train `options.teacher` on the data, as a run with the model as its artifact.

    An interrupted training goes on from its checkpoint if `options.resume` names its run.

    Args:
        options: What concerns the teacher.
        splits: The data, if it was loaded already.
        before: Called before the training with the teacher and the data as it numbers them.

    Raises:
        ModelError: The model cannot be found, saved or loaded, or has other labels and `epochs`
            is 0.
    """
    from mlflow_pt_deploy.models import load_classifier, new_classifier
    from mlflow_pt_deploy.rehearsal import rehearse
    from mlflow_pt_deploy.train import check_fit, cross_entropy

    splits = splits or _prepared(options)
    source = tracking.fetch_model(options.teacher)
    if options.epochs == 0:
        classifier = load_classifier(source)
        splits = align(splits, classifier.labels)
    else:
        classifier = new_classifier(
            source, splits.labels, splits.train.rows, image_size=options.image_size
        )
    check_fit(classifier, splits)
    interrupt.check()
    rehearse(classifier, splits.train.rows, "the teacher")
    if before is not None:
        before(classifier, splits)
    lesson = Lesson(cross_entropy(splits.train.targets))
    return fit_in_run("train", options, splits, classifier, lesson, options.epochs)


def distill_student(options: Options, splits: Splits | None = None) -> Trained:
    """Distill a student with `options.student_layers` layers from a fine-tuned teacher.

    0 layers make a static student, which learns for `options.static_epochs`. Of a teacher of images
    the student is a MobileNetV2, whatever the layers.

    Raises:
        DataError: The teacher was not fine-tuned on these labels, or not on such rows.
        ModelError: It has fewer layers, or there is no such student of images.
    """
    import torch

    from mlflow_pt_deploy.models import load_classifier
    from mlflow_pt_deploy.rehearsal import rehearse_students
    from mlflow_pt_deploy.students import start_student
    from mlflow_pt_deploy.train import check_fit

    splits = splits or _prepared(options)
    teacher = load_classifier(tracking.fetch_model(options.teacher))
    splits = align(splits, teacher.labels)
    check_fit(teacher, splits)
    interrupt.check()
    torch.manual_seed(options.seed)
    rehearse_students(
        teacher, replace(options, trials=0, student_epochs=1, static_epochs=0), splits
    )
    student = start_student(teacher, options, splits)
    lesson = _lesson(teacher, student, options, splits)
    epochs = options.student_epochs if options.student_layers else options.static_epochs
    return fit_in_run(distill_stage(options), options, splits, student, lesson, epochs)


def _lesson(teacher: Any, student: Any, options: Options, splits: Splits) -> Lesson:
    """What a teacher teaches: of texts once and for all, of images other views in each epoch."""
    from mlflow_pt_deploy.distill import soft_labels, teach, view_labels, with_relations

    share = {"temperature": options.temperature, "weight": options.soft_weight}
    if splits.column == "image":
        return Lesson(view_labels(teacher.to(options.device), splits.train.targets, **share))
    count = round((1 + options.made_texts) * len(splits.train))
    print(f"distill: the teacher labels {count} rows", flush=True)
    cache, made = home() / "logits", options.made_texts
    taught = teach(
        teacher, splits.train, cache, made=made, seed=options.seed, device=options.device
    )
    loss = soft_labels(taught.logits, taught.split.targets, **share)
    loss = with_relations(loss, student, taught.features, options.relation_weight)
    return Lesson(loss, taught.split)


def distill_stage(options: Options) -> str:
    """How the run of a student is tagged, by its kind."""
    return "distill" if options.student_layers else "distill-static"


def unless_finished(
    parent: str,
    stage: str,
    work: Callable[[Options, Splits], Trained],
    options: Options,
    splits: Splits,
) -> Trained:
    """Do a stage as a child of a run, or read or resume what an interrupted run left of it."""
    run = tracking.child_run(parent, stage) if options.resume else None
    options = replace(options, resume="")
    if run is None or run.data.tags.get(tracking.OPTIONS_TAG) != options.to_json():
        return work(options, splits)
    if run.info.status == "FINISHED":
        found = run.data.metrics
        address = f"runs:/{run.info.run_id}/model"
        return Trained(run.info.run_id, address, found["accuracy"], found["seconds"])
    return work(replace(options, resume=run.info.run_id), splits)


def optimize_models(options: Options, splits: Splits | None = None) -> Optimized:
    """Build every variant, measure it, log it, and choose.

    The variants become children of the active run, or of a run of their own. Nothing is promoted.

    Raises:
        DataError: A model has other labels than the data, or reads other rows.
        ModelError: A model cannot be read.
        VariantError: The baseline, eager fp32, cannot be measured.
    """
    from mlflow_pt_deploy.models import load_classifier
    from mlflow_pt_deploy.train import check_fit

    options.policy(), select(options.variants)  # a typo must not cost an hour
    splits = splits or _prepared(options)
    reference = TEACHER if options.student else MODEL
    models = {reference: Path(tracking.fetch_model(options.teacher))}
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
        tracking.log_dataset_facts(splits)
        return optimize(run.info.run_id, models, splits, options)


def promote_choice(optimized: Optimized, name: str) -> Promotion:
    """Move the alias `champion` of a registered model to the chosen variant.

    Raises:
        PolicyError: Nothing was chosen.
        TrackingError: The registry refused.
    """
    choice = optimized.choice
    if choice.variant is None:
        raise PolicyError(f"nothing is promoted. {choice.reason}")
    result = next(each for each in optimized.results if each.variant == choice.variant)
    facts = {**result.metrics(""), **result.metrics("validation")}
    tags = {
        "pt_deploy.variant": choice.variant,
        "pt_deploy.run": optimized.run_id,
        **{key: f"{facts[key]:.6g}" for key in ("accuracy", "latency_p50_ms", "speedup")},
    }
    interrupt.check()
    with interrupt.shielded():  # the alias moves with the version's tags, or not at all
        return promote(optimized.models[choice.variant], name, choice.reason, tags)


def read_optimized(run_id: str, policy: Policy | None = None) -> Optimized:
    """What an earlier run measured, chosen anew under a policy (default: its own).

    Raises:
        TrackingError: The run is not on this tracking server.
        ModelError: The run has no finished optimize stage.
    """
    saved = tracking.saved_options(run_id)
    try:
        results = mlflow.artifacts.load_dict(f"runs:/{run_id}/results.json")
        models = mlflow.artifacts.load_dict(f"runs:/{run_id}/models.json")
    except Exception as error:  # each artifact store has its own
        raise ModelError(
            f"run {run_id} has no finished optimize stage. Finish it: "
            f"pt-deploy run --resume {run_id}"
        ) from error
    rows = tuple(Result.from_json(result) for result in results["results"])
    return Optimized(run_id, rows, models, choose(rows, policy or saved.policy()))


def _students(addresses: str) -> dict[str, Path]:
    """Fetched models by the name that their kind gives them."""
    found: dict[str, Path] = {}
    for address in filter(None, (part.strip() for part in addresses.split(","))):
        path = Path(tracking.fetch_model(address))
        config = json.loads((path / "config.json").read_text(encoding="utf8"))
        name = STATIC_STUDENT if config.get("model_type") == STATIC else STUDENT
        if name in found:
            raise ModelError(
                f"student: {address} is the second {name} student; give one of each kind, a "
                "transformer and a static one."
            )
        found[name] = path
    return found


def _prepared(options: Options) -> Splits:
    check_tracking()
    return load_data(options.data, seed=options.seed, limit=options.limit, say=print)
